"""Download a GPT-2 from the Hugging Face hub: `nanovllm download` for a clone where the package is not installed.

Run: python scripts/download_gpt2.py --model gpt2 --output ./models/gpt2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.cli.download import DESCRIPTION, add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
