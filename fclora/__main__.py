"The command `fclora` as `python -m fclora`, which launchers of several processes start"
import sys
from fclora.cli import main

if __name__=='__main__': sys.exit(main())
