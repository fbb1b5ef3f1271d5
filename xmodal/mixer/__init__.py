"""How tasks share the training of one model: what each step trains, and how losses are weighed."""
