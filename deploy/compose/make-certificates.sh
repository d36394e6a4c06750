#!/bin/sh
# Makes the certificates of the three nodes, of the operator and of NBD clients; renews those that are there.
# Runs in a container of its own before the nodes start, which read a renewed certificate without a restart.
#
#   /authority          the authority's key: no node ever mounts it
#   /nodes/NODE         one volume for each node, so that none of them sees another's key
#   /host               a folder of the host: certificates for standbyctl and for NBD clients there
set -eu

[ -e /authority/ca-key.pem ] || standbyctl pki init --dir /authority

# certificate ROLE NAME FOLDER OWNER [HOST …]
certificate() {
  role=$1 name=$2 folder=$3 owner=$4
  shift 4
  if [ -e "$folder/cert.pem" ]; then
    standbyctl pki issue "$role" "$name" --dir /authority --out "$folder" --renew
  else
    hosts=
    for host in "$@"; do hosts="$hosts --host $host"; done
    # shellcheck disable=SC2086
    standbyctl pki issue "$role" "$name" --dir /authority --out "$folder" $hosts
  fi
  chown -R "$owner" "$folder"
}

# The two data nodes swap places at a failover, so each has a name on the data link's network.
# The ports are published on the host's loopback, so every node is reached by that name too.
certificate data primary /nodes/primary/tls stillpoint:stillpoint primary primary-datalink localhost 127.0.0.1
certificate data standby /nodes/standby/tls stillpoint:stillpoint standby standby-datalink localhost 127.0.0.1
certificate backup backup /nodes/backup/tls stillpoint:stillpoint backup localhost 127.0.0.1

user=$(stat -c %u:%g /host)
certificate admin operator /host/admin "$user"
certificate client client /host/client "$user"
