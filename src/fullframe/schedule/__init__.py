"""In which order stages run, what is rematerialized, where maps lie, and how stages are cut into tiles."""
