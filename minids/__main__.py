"""`python -m minids` is the command `minids`.

Paper   none.
Dims    none.
Book    book/00_start.ipynb             Kernel  none
"""

from minids.cli import main

if __name__ == "__main__":
    main()
