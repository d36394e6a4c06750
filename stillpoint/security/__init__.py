"""Who may do what: roles and identities (`roles`), the table of rights (`authorization`), certificates (`pki`).

`stillpoint.tls` puts them to use on sockets, `stillpoint.wire.guard` on gRPC calls, `stillpoint.nbd.access` on exports.
"""
