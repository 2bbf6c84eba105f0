"""Train with token-level credit: accelerate launch train.py --config configs/NAME.yaml [--field value ...]"""

from ktae_trl.cli import train_script

if __name__ == "__main__":  # spawned processes import this file too
    train_script()
