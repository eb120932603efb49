"""A trained model as a service: what it answers, how requests share batches, HTTP, and a page."""
