"""The stages. Each is an island: one Config, one run(config), and helpers of its own."""
