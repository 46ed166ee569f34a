"""What only a CUDA device can show; collected only where there is one (tests/conftest.py)."""
