from evit.commands import main

main(__name__)
