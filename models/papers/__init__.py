"""One paper a file: mian, stec, deepmr, dynint, feseq."""
