//! A pod's user namespace: which ids it has, and the namespaces it owns.
//!
//! A process holds it (`Plan::Pause`). That process is made in new user, network, IPC, UTS, PID and
//! mount namespaces; the agent maps its ids and gives it the guest's network cards. Containers are
//! made inside, so that the powers they have over their pod's network are theirs there, too.

use crate::{
    error::{Error, Step},
    network,
    plan::IdMap,
};
use a3s_box_api::agent::v1 as api;
use a3s_box_sys::clone3::{self, namespace};
use oci_spec::runtime as oci;
use rustix::{
    fd::{AsFd, OwnedFd},
    process::Pid,
};
use std::{fs, io};

/// A pod's user namespace.
#[derive(Debug)]
pub struct UserNamespace {
    /// Its ids.
    pub ids: IdMap,
    /// Its file in /proc, to map the ids of mounts by.
    pub file: OwnedFd,
    /// The process that holds it.
    pub holder: Pid,
    /// The same.
    pub pidfd: OwnedFd,
}

impl IdMap {
    /// What ConfigureSandbox asks for.
    pub fn of_sandbox(asked: &api::UserNamespace) -> Result<Self, Error> {
        let api::UserNamespace { uid, gid, length } = *asked;
        let ids = Self { uid, gid, length };
        // The last id means "unchanged" to the kernel.
        let fits = |first: u32| first.checked_add(length).is_some();
        if length == 0 || !fits(uid) || !fits(gid) {
            return Err(Error::invalid(format!(
                "user_namespace: {length} ids from user {uid} and group {gid} do not exist"
            )));
        }
        Ok(ids)
    }

    /// What a spec's mappings say. `what` names whose they are.
    pub fn of_spec(
        what: &str,
        uids: &[oci::LinuxIdMapping],
        gids: &[oci::LinuxIdMapping],
    ) -> Result<Self, Error> {
        match (uids, gids) {
            ([uids], [gids])
                if uids.container_id() == 0
                    && gids.container_id() == 0
                    && uids.size() == gids.size() =>
            {
                Ok(Self { uid: uids.host_id(), gid: gids.host_id(), length: uids.size() })
            }
            _ => Err(Error::Unsupported(format!(
                "{what}: anything but one mapping of users and one of groups, both from 0 and of \
                 one length,"
            ))),
        }
    }
}

impl UserNamespace {
    /// Makes the namespaces of `holder`, a process that waits in them, usable.
    pub fn set_up(
        holder: Pid,
        pidfd: OwnedFd,
        ids: IdMap,
        network: Option<&api::Network>,
    ) -> Result<Self, Error> {
        let IdMap { uid, gid, length } = ids;
        for (file, first) in [("uid_map", uid), ("gid_map", gid)] {
            let file = format!("/proc/{holder}/{file}");
            fs::write(&file, format!("0 {first} {length}\n")).step(file)?;
        }
        if let Some(network) = network {
            network::hand_over(network, holder)?;
        }
        let file = format!("/proc/{holder}/ns/user");
        let file = fs::File::open(&file).step(file)?.into();
        let this = Self { ids, file, holder, pidfd };
        this.in_network(|| {
            network::loopback_up().step("loopback")?;
            network.map_or(Ok(()), network::configure)
        })
        .step("the pod's network namespace")??;
        Ok(this)
    }

    /// Does `work` in the pod's network namespace.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                clone3::join(self.pidfd.as_fd(), namespace::NET)?;
                Ok(work())
            });
            inside.join().map_err(|_| io::Error::other("the thread in it ended badly"))?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ids_that_do_not_exist_are_refused() {
        let asked = |uid, gid, length| api::UserNamespace { uid, gid, length };
        for bad in [asked(1, 1, 0), asked(u32::MAX, 1, 2), asked(1, u32::MAX - 1, 65536)] {
            assert!(IdMap::of_sandbox(&bad).is_err(), "{bad:?}");
        }
        let ids = IdMap::of_sandbox(&asked(1000, 2000, 100_000)).unwrap();
        assert_eq!(ids, IdMap { uid: 1000, gid: 2000, length: 100_000 });
    }

    #[test]
    fn a_spec_has_one_mapping_of_each_kind() {
        let read = |uids, gids| {
            let list = |value| serde_json::from_value::<Vec<_>>(value).unwrap();
            IdMap::of_spec("it", &list(uids), &list(gids))
        };
        let one = |first: u32, host: u32, size: u32| json!([{ "containerID": first, "hostID": host, "size": size }]);
        let ids = read(one(0, 5, 9), one(0, 6, 9)).unwrap();
        assert_eq!(ids, IdMap { uid: 5, gid: 6, length: 9 });
        for (uids, gids) in [
            (json!([]), json!([])),
            (one(0, 5, 9), json!([])),
            (one(1, 5, 9), one(1, 5, 9)),
            (one(0, 5, 9), one(0, 5, 8)),
        ] {
            let error = read(uids, gids).unwrap_err().to_string();
            assert!(error.contains("it: "), "{error}");
        }
    }
}
