//! The mounts of a container: those every container has, the pod's files, then the spec's own.

use crate::{
    config::{Boundary, Config},
    error::Error,
    huge_pages,
    plan::{IdMap, Mount, MountKind, SerdeChange},
};
use a3s_box_sys::mount_attr::{flag, propagation};
use oci_spec::runtime as oci;
use std::path::{Path, PathBuf};

/// File systems a spec may ask for; binds are the rest.
const KINDS: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup2", "ramfs"];

/// Type of the mounts that show an image.
const IMAGE: &str = "image";

/// Type of the mounts that stand for a volume of huge pages; their source is the volume's path on the host.
const HUGE_PAGES: &str = "hugetlbfs";

/// The mounts in order; `ids` are those of the container's user namespace. A mount of the spec replaces the default at the same place, in its place.
pub fn read(
    spec: &[oci::Mount],
    config: &Config,
    readonly_root: bool,
    ids: Option<IdMap>,
) -> Result<Vec<Mount>, Error> {
    let mut asked = Vec::with_capacity(spec.len());
    for mount in spec {
        asked.push(read_one(mount, config, ids)?);
    }
    let mut all = Vec::new();
    for default in defaults(config, readonly_root) {
        // The last one at a place is on top, and so the one that counts.
        match asked.iter().position(|mount| mount.destination == default.destination) {
            Some(at) if is_base(&default) => all.push(asked.remove(at)),
            Some(_) => {}
            None => all.push(default),
        }
    }
    all.extend(asked);
    Ok(all)
}

/// Mounts that others are mounted on.
fn is_base(mount: &Mount) -> bool {
    matches!(mount.kind, MountKind::New { .. })
}

fn defaults(config: &Config, readonly_root: bool) -> Vec<Mount> {
    let new = |destination: &str, kind: &str, set: u64, options: &[(&str, Option<&str>)]| Mount {
        destination: destination.into(),
        kind: MountKind::New {
            kind: kind.into(),
            source: kind.into(),
            options: options
                .iter()
                .map(|(name, value)| ((*name).into(), value.map(Into::into)))
                .collect(),
        },
        changes: vec![SerdeChange { set, ..SerdeChange::default() }],
        mapped: true,
    };
    let bind = |destination: &str, source: PathBuf, set: u64| Mount {
        destination: destination.into(),
        kind: MountKind::Bind { source, recursive: false, from_node: false },
        changes: vec![
            SerdeChange { set, ..SerdeChange::default() },
            SerdeChange { propagation: propagation::PRIVATE, ..SerdeChange::default() },
        ],
        mapped: true,
    };
    let quiet = flag::NOSUID | flag::NODEV | flag::NOEXEC;
    let file = if readonly_root { flag::RDONLY } else { 0 };
    vec![
        new("/proc", "proc", quiet, &[]),
        new(
            "/dev",
            "tmpfs",
            flag::NOSUID | flag::STRICTATIME,
            &[("mode", Some("755")), ("size", Some("65536k"))],
        ),
        new(
            "/dev/pts",
            "devpts",
            flag::NOSUID | flag::NOEXEC,
            &[
                ("newinstance", None),
                ("ptmxmode", Some("0666")),
                ("mode", Some("0620")),
                ("gid", Some("5")),
            ],
        ),
        new("/dev/mqueue", "mqueue", quiet, &[]),
        new("/sys", "sysfs", quiet | flag::RDONLY, &[]),
        new("/sys/fs/cgroup", "cgroup2", quiet | flag::RDONLY, &[]),
        bind("/dev/shm", config.shm(), quiet),
        bind("/etc/resolv.conf", config.etc("resolv.conf"), file),
        bind("/etc/hosts", config.etc("hosts"), file),
        bind("/etc/hostname", config.etc("hostname"), file),
    ]
}

fn read_one(mount: &oci::Mount, config: &Config, ids: Option<IdMap>) -> Result<Mount, Error> {
    let destination = normal(mount.destination())?;
    let what = format!("mount {}", destination.display());
    let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
    let (uids, gids) = (uids.as_deref().unwrap_or_default(), gids.as_deref().unwrap_or_default());
    let mapped = !uids.is_empty() || !gids.is_empty();
    if mapped && Some(IdMap::of_spec(&what, uids, gids)?) != ids {
        return Err(Error::Unsupported(format!(
            "{what}: a mapping of ids that is not the container's own"
        )));
    }
    let kind = mount.typ().as_deref().unwrap_or("bind");
    let mut options = Options::default();
    for option in mount.options().iter().flatten() {
        options.read(option);
    }
    if kind == "bind" || options.bind.is_some() {
        if let Some((name, _)) = options.rest.first() {
            return Err(Error::Unsupported(format!("{what}: the option {name:?} of a bind mount")));
        }
        let source =
            mount.source().clone().ok_or_else(|| Error::invalid(format!("{what}: no source")))?;
        if !source.is_absolute() {
            return Err(Error::invalid(format!(
                "{what}: the source {} is not absolute",
                source.display()
            )));
        }
        let recursive = options.bind.unwrap_or(false);
        if options.propagation.is_none() {
            options.propagation = Some((propagation::PRIVATE, true));
        }
        // In the pod's mount namespace everything of the node's is a slave.
        let shared = options.propagation.is_some_and(|(kind, _)| kind == propagation::SHARED);
        let from_node = shared && config.boundary == Boundary::Host;
        return Ok(Mount {
            destination,
            kind: MountKind::Bind { source, recursive, from_node },
            changes: options.changes(),
            mapped,
        });
    }
    if kind == IMAGE {
        if let Some((name, _)) = options.rest.first() {
            return Err(Error::Unsupported(format!("{what}: the option {name:?} of an image")));
        }
        options.set |= flag::RDONLY;
        options.clear &= !flag::RDONLY;
        return Ok(Mount {
            destination,
            kind: MountKind::Image { layers: Vec::new(), sub_path: PathBuf::new() },
            changes: options.changes(),
            mapped: true,
        });
    }
    if kind == HUGE_PAGES && config.boundary == Boundary::Guest {
        let volume = mount.source().clone().unwrap_or_default();
        return Ok(Mount {
            destination,
            kind: MountKind::Bind {
                source: huge_pages::folder(config, &volume),
                recursive: false,
                from_node: false,
            },
            changes: options.changes(),
            mapped: false,
        });
    }
    // One hierarchy is all there is; the old name is what specs have.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    if !KINDS.contains(&kind) {
        return Err(Error::Unsupported(format!("{what}: the file system {kind:?}")));
    }
    Ok(Mount {
        destination,
        kind: MountKind::New {
            kind: kind.to_owned(),
            source: mount
                .source()
                .as_ref()
                .map_or_else(|| kind.to_owned(), |source| source.display().to_string()),
            options: std::mem::take(&mut options.rest),
        },
        changes: options.changes(),
        mapped: true,
    })
}

/// Gives the mount of type `image` at `destination` what it shows.
pub fn show_image(
    mounts: &mut [Mount],
    destination: &str,
    shown: Vec<PathBuf>,
    below: &str,
) -> Result<(), Error> {
    let place = normal(Path::new(destination))?;
    for mount in mounts.iter_mut().filter(|mount| mount.destination == place) {
        if let MountKind::Image { layers, sub_path } = &mut mount.kind {
            (*layers, *sub_path) = (shown, below.into());
            return Ok(());
        }
    }
    Err(Error::invalid(format!("image_mounts: oci_spec has no image at {destination}")))
}

/// `/a//b/` is `/a/b`; `..` has no place in a destination.
fn normal(path: &Path) -> Result<PathBuf, Error> {
    if !path.is_absolute() || path.components().any(|part| part == std::path::Component::ParentDir)
    {
        return Err(Error::invalid(format!("mount {}: not a plain absolute path", path.display())));
    }
    Ok(path.components().collect())
}

#[derive(Default)]
struct Options {
    /// Recursive or not; none: not a bind.
    bind: Option<bool>,
    set: u64,
    clear: u64,
    recursive_set: u64,
    recursive_clear: u64,
    propagation: Option<(u64, bool)>,
    rest: Vec<(String, Option<String>)>,
}

impl Options {
    fn read(&mut self, option: &str) {
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "defaults" | "" => {}
            _ => {
                if let Some(change) = propagation_of(option) {
                    self.propagation = Some(change);
                } else if let Some((set, clear)) = flag_of(option) {
                    self.set = self.set & !clear | set;
                    self.clear = self.clear & !set | clear;
                } else if let Some((set, clear)) = option.strip_prefix('r').and_then(flag_of) {
                    self.recursive_set = self.recursive_set & !clear | set;
                    self.recursive_clear = self.recursive_clear & !set | clear;
                } else {
                    let (name, value) = match option.split_once('=') {
                        Some((name, value)) => (name, Some(value.to_owned())),
                        None => (option, None),
                    };
                    self.rest.push((name.to_owned(), value));
                }
            }
        }
    }

    fn changes(&self) -> Vec<SerdeChange> {
        let none = SerdeChange::default();
        let mut all = vec![
            SerdeChange {
                set: self.recursive_set,
                clear: self.recursive_clear,
                recursive: true,
                ..none
            },
            SerdeChange { set: self.set, clear: self.clear, ..none },
        ];
        if let Some((propagation, recursive)) = self.propagation {
            all.push(SerdeChange { propagation, recursive, ..none });
        }
        all.retain(|change| change.set != 0 || change.clear != 0 || change.propagation != 0);
        all
    }
}

fn propagation_of(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "private" => (propagation::PRIVATE, false),
        "rprivate" => (propagation::PRIVATE, true),
        "slave" => (propagation::SLAVE, false),
        "rslave" => (propagation::SLAVE, true),
        "shared" => (propagation::SHARED, false),
        "rshared" => (propagation::SHARED, true),
        "unbindable" => (propagation::UNBINDABLE, false),
        "runbindable" => (propagation::UNBINDABLE, true),
        _ => return None,
    })
}

/// Flags to set and to clear.
fn flag_of(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (flag::RDONLY, 0),
        "rw" => (0, flag::RDONLY),
        "nosuid" => (flag::NOSUID, 0),
        "suid" => (0, flag::NOSUID),
        "nodev" => (flag::NODEV, 0),
        "dev" => (0, flag::NODEV),
        "noexec" => (flag::NOEXEC, 0),
        "exec" => (0, flag::NOEXEC),
        "noatime" => (flag::NOATIME, 0),
        "strictatime" => (flag::STRICTATIME, 0),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, flag::ATIME),
        "nodiratime" => (flag::NODIRATIME, 0),
        "diratime" => (0, flag::NODIRATIME),
        "nosymfollow" => (flag::NOSYMFOLLOW, 0),
        "symfollow" => (0, flag::NOSYMFOLLOW),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const IDS: IdMap = IdMap { uid: 1000, gid: 2000, length: 65536 };

    fn read_json(mounts: Value) -> Result<Vec<Mount>, Error> {
        let mounts: Vec<oci::Mount> = serde_json::from_value(mounts).unwrap();
        read(&mounts, &Config::guest(), false, Some(IDS))
    }

    fn at<'a>(mounts: &'a [Mount], destination: &str) -> Vec<&'a Mount> {
        mounts.iter().filter(|mount| mount.destination == Path::new(destination)).collect()
    }

    #[test]
    fn a_spec_without_mounts_still_gives_a_usable_container() {
        let mounts = read_json(json!([])).unwrap();
        for place in
            ["/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/etc/hosts", "/etc/resolv.conf"]
        {
            assert_eq!(at(&mounts, place).len(), 1, "{place}");
        }
    }

    #[test]
    fn a_mount_of_the_spec_replaces_the_default_and_keeps_its_place() {
        let mounts = read_json(json!([
            { "destination": "/etc/hosts/", "type": "bind", "source": "/share/volumes/x/0", "options": ["rbind", "ro"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=700"] },
        ]))
        .unwrap();
        let [hosts] = at(&mounts, "/etc/hosts")[..] else { panic!("two mounts at one place") };
        assert_eq!(
            hosts.kind,
            MountKind::Bind {
                source: "/share/volumes/x/0".into(),
                recursive: true,
                from_node: false
            }
        );
        let position =
            |place| mounts.iter().position(|mount| mount.destination == Path::new(place)).unwrap();
        assert!(position("/dev") < position("/dev/pts"));
        assert_eq!(at(&mounts, "/dev").len(), 1);
    }

    #[test]
    fn a_shared_mount_is_taken_from_the_node_only_where_there_is_one() {
        let mounts: Vec<oci::Mount> = serde_json::from_value(json!([
            { "destination": "/v", "source": "/s", "options": ["rbind", "rshared"] },
            { "destination": "/w", "source": "/s", "options": ["rbind", "rslave"] },
        ]))
        .unwrap();
        let host = Config { boundary: Boundary::Host, ..Config::guest() };
        for (config, expected) in [(host, [true, false]), (Config::guest(), [false, false])] {
            let mounts = read(&mounts, &config, false, None).unwrap();
            let from_node = ["/v", "/w"].map(|place| match at(&mounts, place)[0].kind {
                MountKind::Bind { from_node, .. } => from_node,
                MountKind::New { .. } | MountKind::Image { .. } => panic!("a bind"),
            });
            assert_eq!(from_node, expected);
        }
    }

    #[test]
    fn read_only_is_recursive_only_when_asked_for() {
        let bind = |options: Value| {
            let mounts =
                read_json(json!([{ "destination": "/v", "source": "/s", "options": options }]))
                    .unwrap();
            at(&mounts, "/v")[0].changes.clone()
        };
        let none = SerdeChange::default();
        let private = SerdeChange { propagation: propagation::PRIVATE, recursive: true, ..none };
        assert_eq!(
            bind(json!(["rbind", "ro"])),
            [SerdeChange { set: flag::RDONLY, ..none }, private]
        );
        assert_eq!(
            bind(json!(["rbind", "rro"])),
            [SerdeChange { set: flag::RDONLY, recursive: true, ..none }, private]
        );
        assert_eq!(
            bind(json!(["rbind", "rslave", "ro", "rw"])),
            [
                SerdeChange { clear: flag::RDONLY, ..none },
                SerdeChange { propagation: propagation::SLAVE, recursive: true, ..none }
            ]
        );
    }

    #[test]
    fn a_mount_is_mapped_as_its_container_or_not_at_all() {
        let mapping = |host: u32| json!([{ "containerID": 0, "hostID": host, "size": IDS.length }]);
        let mount = |uids: Value, gids: Value| {
            read_json(json!([
                { "destination": "/v", "source": "/s", "uidMappings": uids, "gidMappings": gids }
            ]))
        };
        assert!(at(&mount(mapping(1000), mapping(2000)).unwrap(), "/v")[0].mapped);
        assert!(!at(&mount(json!([]), json!([])).unwrap(), "/v")[0].mapped);
        let error = mount(mapping(1000), mapping(1000)).unwrap_err().to_string();
        assert!(error.contains("mount /v: a mapping of ids"), "{error}");
    }

    #[test]
    fn what_a_mount_cannot_be_is_refused() {
        for (mount, words) in [
            (json!({ "destination": "v", "source": "/s" }), "absolute"),
            (json!({ "destination": "/a/../b", "source": "/s" }), "plain"),
            (json!({ "destination": "/v", "source": "s" }), "source"),
            (json!({ "destination": "/v", "source": "/s", "options": ["bind", "idmap"] }), "idmap"),
            (json!({ "destination": "/v", "type": "nfs", "source": "a:/b" }), "nfs"),
        ] {
            let error = read_json(json!([mount])).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
