"""Many runs side by side in one process: arms that share a frozen base and differ in learning rate and seed."""
