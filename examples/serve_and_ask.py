"""Serve an artifact on this machine and ask it with the openai package, as any client would.

python examples/serve_and_ask.py ARTIFACT     (after pip install 'moec[serve]' openai)
"""

import subprocess
import sys

import openai

COMMAND = [sys.executable, "-m", "moec.compiler.cli"]


def main(folder: str) -> str:
    serving = subprocess.Popen([*COMMAND, "serve", folder, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        first = serving.stderr.readline() if serving.stderr else ""  # NAME on http://127.0.0.1:PORT/v1; Ctrl-C ends it
        address = next((word.rstrip(";") for word in first.split() if word.startswith("http")), None)
        if address is None:
            raise SystemExit(first)
        client = openai.OpenAI(base_url=address, api_key="none")
        model = client.models.list().data[0].id
        stream = client.completions.create(model=model, prompt="def main():", max_tokens=16, temperature=0, stream=True)
        text = "".join(piece.choices[0].text for piece in stream)
        print(text)
        return text
    finally:
        serving.terminate()
        serving.wait()


if __name__ == "__main__":
    main(sys.argv[1])
