"""`python -m shoestring` is `shoestring`."""

from shoestring.cli import main

if __name__ == "__main__":
    main()
