"""Train with token-level credit: accelerate launch train.py --config configs/NAME.yaml [--field value ...]"""

from ktae_trl.training.run import main

if __name__ == "__main__":  # spawned processes import this file too
    main()
