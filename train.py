"""Train, validate, test and use an image classifier: `uv run train.py fit --config configs/quickstart.yaml`.

Commands: fit, validate, test, predict; `uv run train.py fit --help` lists every key. Keys come from
    the config files in
the order given and then from the command line, where the later one wins: `--model.lr 3e-4
--trainer.max_epochs 10`.
"""

if __name__ == "__main__":
    from visattn.training.cli import main

    main()
