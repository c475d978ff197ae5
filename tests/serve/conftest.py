from conftest_serve import live, random_tiny_folder, run_server, served  # noqa: F401
