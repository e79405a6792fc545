from evit.commands import main

if __name__ == "__main__":
    main()
