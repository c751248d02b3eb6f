"""What the stages share: on-disk formats, language models, sparse autoencoders, and the ground floor below them."""
