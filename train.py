"""Train, validate, test or predict: `python train.py fit --config configs/avar_sft.yaml`."""

import sys

from avar_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
