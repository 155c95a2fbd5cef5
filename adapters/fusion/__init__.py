"""Methods that change how pictures and text meet inside the language model."""
