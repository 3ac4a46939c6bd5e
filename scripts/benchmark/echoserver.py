"""The least that answers with a descriptor: ``python echoserver.py PATH``, with trio.

It listens on a Unix socket, and sends each message back with one end of a new pair of sockets. What
a pin takes longer than such an answer is the product's. It ends when its stdin does.
"""

import array
import socket
import sys

import trio


async def echo(stream: trio.SocketStream) -> None:
    """Answer one connection until it ends."""
    connection = stream.socket
    while message := await connection.recv(4096):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            rights = array.array("i", [theirs.fileno()])
            await connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


async def main(path: str) -> None:
    """Serve until stdin ends."""
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, echo, [trio.SocketListener(listener)])
            await trio.lowlevel.wait_readable(sys.stdin)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
