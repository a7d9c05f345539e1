"""Generate with an artifact's model.onnx in plain ONNX Runtime: no moec, greedy, with the caches as they come.

python examples/plain_onnxruntime.py ARTIFACT PROMPT
"""

import sys

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def main(folder: str, prompt: str, count: int = 16) -> list[int]:
    session = ort.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    states = [i for i in session.get_inputs() if i.name.startswith("past_")]
    shapes = [[1 if s == "B" else 0 if s == "P" else s for s in i.shape] for i in states]
    feeds = {i.name: np.zeros(s, TYPES[i.type]) for i, s in zip(states, shapes, strict=True)}
    tokens, past, found = tokenizer.encode(prompt).ids, 0, list[int]()
    while len(found) < count:
        feeds |= {"input_ids": np.array([tokens]), "position_ids": np.arange(past, past + len(tokens))[None]}
        feeds["attention_mask"] = np.ones((1, past + len(tokens)), np.int64)
        logits, *caches = session.run(None, feeds)
        feeds |= {i.name: cache for i, cache in zip(states, caches, strict=True)}
        past += len(tokens)
        tokens = [int(logits[0, -1].argmax())]
        found += tokens
    print(tokenizer.decode(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
