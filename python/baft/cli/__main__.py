from baft.cli import main

main()
