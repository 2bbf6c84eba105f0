from ktae_trl.cli import main

main()
