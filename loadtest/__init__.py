"""The load generator. `loadtest.bench` measures this project with it."""
