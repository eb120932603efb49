"""What a pre-trained BERT is for: labelled data in, a model that answers out, and its worth."""
