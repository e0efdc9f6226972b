"""`python -m minids` is the command `minids`.

Paper   none.
Dims    none.
Book    book/00_start.ipynb             Kernel  none
"""

from minids.cli import app

if __name__ == "__main__":
    app(prog_name="minids")
