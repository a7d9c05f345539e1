"""Sources to modules.

load          any source to a module and its weights
transformers  checkpoint folders and live models: rehearse, trace each kind of layer, trace the whole
aten          torch.export, and its operators as ops of the IR
onnx          ONNX files and models
programs      torch modules, exported programs and .pt2 files that nobody prepared
replaced      what stands for code of transformers that cannot be traced as it is
stored        how quantized checkpoints store weights
gguf          GGUF files
deepseek_v4   DeepSeek-V4, built from its config and tensors: traced, it would hold for some lengths only
skeleton      a model without weights
companions    the files that travel with the weights into an artifact
text_weights  checks the weights that a .moir file names against a checkpoint
families      the families that the tests compare, each with a tiny configuration
"""
