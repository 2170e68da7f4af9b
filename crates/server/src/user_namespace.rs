//! The pod's user namespace, as the CRI asks for it (KEP-127).

use crate::sandbox::SandboxError;
use a3s_box_api::cri::{IdMapping, NamespaceMode, NamespaceOption};
use serde::{Deserialize, Serialize};

const AT: &str = "linux.security_context.namespace_options.userns_options";

/// Ids 0 to `length - 1` of the pod are `uid`, `gid` and up of its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// The pod's user 0.
    pub uid: u32,
    /// The pod's group 0.
    pub gid: u32,
    /// How many ids.
    pub length: u32,
}

impl UserNamespace {
    /// What is asked for; `None`: that of the guest itself.
    pub fn asked(options: Option<&NamespaceOption>) -> Result<Option<Self>, SandboxError> {
        let Some(options) = options else { return Ok(None) };
        let Some(asked) = &options.userns_options else { return Ok(None) };
        match asked.mode() {
            NamespaceMode::Node if asked.uids.is_empty() && asked.gids.is_empty() => Ok(None),
            NamespaceMode::Node => Err(SandboxError::invalid(AT, "NODE has no mappings")),
            NamespaceMode::Pod => {
                excludes_host_namespaces(options)?;
                Self::of(AT, &asked.uids, &asked.gids).map(Some)
            }
            other => Err(SandboxError::invalid(
                format!("{AT}.mode"),
                format!("{} is not a user namespace's: POD and NODE are", other.as_str_name()),
            )),
        }
    }

    /// Whether a mount's ids are mapped as those of `pod`. Any other mapping is refused.
    pub fn of_mount(
        field: &str,
        uids: &[IdMapping],
        gids: &[IdMapping],
        pod: Option<Self>,
    ) -> Result<bool, SandboxError> {
        if uids.is_empty() && gids.is_empty() {
            return Ok(false);
        }
        if pod == Some(Self::of(field, uids, gids)?) {
            return Ok(true);
        }
        Err(SandboxError::invalid(field, format!("are not those of {AT}")))
    }

    fn of(field: &str, uids: &[IdMapping], gids: &[IdMapping]) -> Result<Self, SandboxError> {
        let uids = single(&format!("{field}.uids"), uids)?;
        let gids = single(&format!("{field}.gids"), gids)?;
        if uids.length != gids.length {
            let why = format!("{} user ids and {} group ids differ", uids.length, gids.length);
            return Err(SandboxError::invalid(field, why));
        }
        Ok(Self { uid: uids.host_id, gid: gids.host_id, length: uids.length })
    }

    /// As the CRI writes it: the users' mapping and the groups'.
    pub fn mappings(self) -> (IdMapping, IdMapping) {
        let mapping = |host_id| IdMapping { host_id, container_id: 0, length: self.length };
        (mapping(self.uid), mapping(self.gid))
    }
}

fn single<'a>(field: &str, mappings: &'a [IdMapping]) -> Result<&'a IdMapping, SandboxError> {
    let bad = |why: String| Err(SandboxError::invalid(field, why));
    let [mapping] = mappings else {
        return bad(format!("one mapping is needed, there are {}", mappings.len()));
    };
    if mapping.container_id != 0 {
        return bad(format!("container_id is {}, 0 is needed", mapping.container_id));
    }
    // The last id means "unchanged" to the kernel.
    if mapping.length == 0 || mapping.host_id.checked_add(mapping.length).is_none() {
        return bad(format!("{} ids from {} do not exist", mapping.length, mapping.host_id));
    }
    Ok(mapping)
}

fn excludes_host_namespaces(options: &NamespaceOption) -> Result<(), SandboxError> {
    let modes = [("network", options.network()), ("pid", options.pid()), ("ipc", options.ipc())];
    match modes.iter().find(|(_, mode)| *mode == NamespaceMode::Node) {
        Some((name, _)) => {
            Err(SandboxError::invalid(AT, format!("mode POD excludes {name} = NODE")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use a3s_box_api::cri;

    fn mapping(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping { host_id, container_id, length }
    }

    fn options(mode: NamespaceMode, uids: &[IdMapping], gids: &[IdMapping]) -> NamespaceOption {
        NamespaceOption {
            userns_options: Some(cri::UserNamespace {
                mode: mode.into(),
                uids: uids.to_vec(),
                gids: gids.to_vec(),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn one_mapping_of_each_kind_is_a_user_namespace() {
        let asked = options(
            NamespaceMode::Pod,
            &[mapping(0, 65536, 131_072)],
            &[mapping(0, 1000, 131_072)],
        );
        let expected = UserNamespace { uid: 65536, gid: 1000, length: 131_072 };
        assert_eq!(UserNamespace::asked(Some(&asked)).unwrap(), Some(expected));
        let (uids, gids) = expected.mappings();
        assert_eq!((uids.host_id, gids.host_id, gids.length), (65536, 1000, 131_072));
        let none = options(NamespaceMode::Node, &[], &[]);
        for none in [None, Some(NamespaceOption::default()), Some(none)] {
            assert_eq!(UserNamespace::asked(none.as_ref()).unwrap(), None);
        }
    }

    #[test]
    fn what_is_no_user_namespace_of_a_pod_is_refused_by_its_reason() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let good = [mapping(0, 1000, 65536)];
        for (why, mode, uids, gids) in [
            ("CONTAINER is not", Container, &[][..], &[][..]),
            ("TARGET is not", Target, &[], &[]),
            ("NODE has no mappings", Node, &good, &good),
            ("uids: one mapping is needed, there are 0", Pod, &[], &good),
            ("gids: one mapping is needed, there are 0", Pod, &good, &[]),
            ("uids: one mapping is needed, there are 2", Pod, &[good[0], good[0]], &good),
            ("uids: container_id is 1", Pod, &[mapping(1, 1000, 65536)], &good),
            ("gids: 0 ids from 1000", Pod, &good, &[mapping(0, 1000, 0)]),
            ("11 ids from 4294967286 do not exist", Pod, &[mapping(0, u32::MAX - 9, 11)], &good),
            ("65536 user ids and 100000 group ids", Pod, &good, &[mapping(0, 1000, 100_000)]),
        ] {
            let error = UserNamespace::asked(Some(&options(mode, uids, gids))).expect_err(why);
            assert!(matches!(error, SandboxError::Invalid { .. }), "{error}");
            assert!(error.to_string().contains(why), "{why}: {error}");
        }
        let mut with_host = options(Pod, &good, &good);
        with_host.pid = Node.into();
        let error = UserNamespace::asked(Some(&with_host)).unwrap_err();
        assert!(error.to_string().contains("excludes pid = NODE"), "{error}");
    }

    #[test]
    fn a_mount_is_mapped_as_its_pod_or_not_at_all() {
        let pod = Some(UserNamespace { uid: 1000, gid: 1000, length: 65536 });
        let own = [mapping(0, 1000, 65536)];
        let mapped = |uids: &[IdMapping], gids: &[IdMapping], pod| {
            UserNamespace::of_mount("mounts[/v]", uids, gids, pod)
        };
        assert!(mapped(&own, &own, pod).unwrap());
        assert!(!mapped(&[], &[], pod).unwrap());
        for (uids, gids, pod) in
            [(&own[..], &own[..], None), (&own, &[], pod), (&own, &[mapping(0, 2000, 65536)], pod)]
        {
            let error = mapped(uids, gids, pod).unwrap_err();
            assert!(error.to_string().contains("mounts[/v]"), "{error}");
        }
    }
}
