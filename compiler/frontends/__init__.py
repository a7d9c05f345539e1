"""Sources to modules.

load                any source to a module and its weights
huggingface         a checkpoint folder, a live transformers model
deepseek_v4         DeepSeek-V4, built from its config and tensors: traced, it would hold for some lengths only
transformers_model  the import itself: rehearse, trace each kind of layer, trace the whole
capture             transformers' registration interfaces; attention, experts and cache as single ops
skeleton            a model without weights
layers              which layers a model has and which are alike
export, aten        torch.export, and its operators as IR ops
stored, layouts     how quantized checkpoints store weights
gguf                a GGUF file
dequantized         a quantized checkpoint as a model of transformers, for `moec verify`
names               parameter names to recipes over checkpoint tensors
"""
