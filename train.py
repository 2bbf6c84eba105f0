"""Train with token-level credit: accelerate launch train.py --config configs/NAME.yaml [--field value ...]"""

from ktae_trl.training.run import main

if __name__ == "__main__":  # a process that is spawned imports this file, too
    main()
