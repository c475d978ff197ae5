"""The laboratory of condit: the icon world, the training of the embedded models, measurements of the papers' claims."""
