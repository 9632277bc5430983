"""The commands of ``iwin-dit``, one module each; the scripts of a checkout call the same ones."""
