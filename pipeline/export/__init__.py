"""`export CHECKPOINT DIR`: a trained model as a folder for people who have transformers and not this project."""
