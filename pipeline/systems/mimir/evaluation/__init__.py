"""What a trained model is worth: measures of its likelihoods and of what it draws, each with its error."""
