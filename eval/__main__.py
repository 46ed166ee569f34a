"""``python -m pilotage.eval COMMAND`` is ``pilotage COMMAND``, for ``accelerate launch -m``."""

from .cli import main

if __name__ == "__main__":
    main()
