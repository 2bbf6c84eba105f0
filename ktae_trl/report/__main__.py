import sys

from ktae_trl.report.run import main

main(sys.argv[1:])
