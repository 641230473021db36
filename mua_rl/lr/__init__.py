"""The learning rate: what theory and measurements say of it, and the record that carries it; free of torch."""
