//! A container's file system, made in its own mount namespace by its first process.
//!
//! With a user namespace the work is divided: what is the guest's is taken while the process still
//! belongs to the guest ([`take`]), the rest is done inside ([`enter`]). Layers and volumes are shown
//! through id-mapped mounts; new files of the rootfs lie in the writable layer with the guest's ids.
//!
//! Everything that comes from the guest is turned into detached mounts first; then overlay becomes
//! the root and the guest's tree is gone; only then are the mounts put in place. So a link in an
//! image is always resolved inside the container, and no path check is needed.

use crate::{
    child::{invalid, step},
    plan::{ContainerPlan, Device, DeviceKind, Failure, Mount, MountKind},
};
use a3s_box_sys::{
    clone3::{self, namespace},
    mount_attr::{self, Change, flag, propagation},
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, makedev},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, mount, mount_change, move_mount, open_tree, unmount,
    },
};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

const DEV: &str = "/dev";

/// A container's root and mounts, which are nowhere yet.
#[derive(Debug)]
pub struct Taken {
    root: OwnedFd,
    /// As the plan's mounts. None: it has to be made in the container's namespaces.
    trees: Vec<Option<OwnedFd>>,
}

/// Takes what needs the guest's rights, and cuts the mount namespace off from the guest's.
pub fn take(
    plan: &ContainerPlan,
    node_mounts: Option<BorrowedFd<'_>>,
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<Taken, Failure> {
    let mut trees = Vec::with_capacity(plan.mounts.len());
    for wanted in &plan.mounts {
        if matches!(wanted.kind, MountKind::Image { .. }) {
            // In its place below.
            trees.push(None);
            continue;
        }
        let devices = plan.standard_devices && wanted.destination == Path::new(DEV);
        let inside = matches!(wanted.kind, MountKind::New { .. }) && !devices;
        let tree = if inside && user_namespace.is_some() {
            None
        } else {
            let from_node = matches!(wanted.kind, MountKind::Bind { from_node: true, .. });
            let tree = if from_node { of_node(wanted, node_mounts)? } else { detached(wanted)? };
            if devices {
                fill_dev(&tree, &plan.devices)?;
            }
            if let Some(namespace) = user_namespace.filter(|_| wanted.mapped) {
                let what = format_args!("mount {}: map ids", wanted.destination.display());
                step(mount_attr::map_ids(tree.as_fd(), namespace), what)?;
            }
            set_flags(&tree, wanted)?;
            Some(tree)
        };
        trees.push(tree);
    }
    // After the trees were taken, so that a shared volume is still its source's peer.
    step(
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC),
        "cut the mount namespace off",
    )?;
    if let Some(namespace) = user_namespace {
        for layer in all_layers(plan) {
            cover_mapped(layer, namespace)?;
        }
    }
    for (wanted, tree) in plan.mounts.iter().zip(&mut trees) {
        if let MountKind::Image { layers, sub_path } = &wanted.kind {
            let what = format!("mount {}", wanted.destination.display());
            let image = image(layers, sub_path, &plan.staging, &what)?;
            set_flags(&image, wanted)?;
            *tree = Some(image);
        }
    }
    Ok(Taken { root: overlay(plan)?, trees })
}

/// The layers of the root and of all images that are mounted, each once.
fn all_layers(plan: &ContainerPlan) -> BTreeSet<&Path> {
    let images = plan.mounts.iter().filter_map(|mount| match &mount.kind {
        MountKind::Image { layers, .. } => Some(layers),
        MountKind::Bind { .. } | MountKind::New { .. } => None,
    });
    images.chain([&plan.layers]).flatten().map(PathBuf::as_path).collect()
}

/// An image, or a folder of it, as a mount that is nowhere yet. `staging` is any folder.
fn image(
    layers: &[PathBuf],
    sub_path: &Path,
    staging: &Path,
    what: &str,
) -> Result<OwnedFd, Failure> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = match layers {
        [] => return Err(invalid(format!("{what}: the image has no layers"))),
        // Overlay wants two.
        [layer] => step(open_tree(CWD, layer, clone), what)?,
        layers => {
            let path = |layer: &PathBuf| Some(layer.display().to_string());
            let options: Vec<_> =
                layers.iter().map(|layer| ("lowerdir+".to_owned(), path(layer))).collect();
            step(new_file_system("overlay", "overlay", &options), what)?
        }
    };
    if sub_path.as_os_str().is_empty() {
        return Ok(root);
    }
    // Only what is mounted somewhere can be cloned in part.
    attach(&root, staging, what)?;
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let root = step(rustix::fs::open(staging, folder, Mode::empty()), what)?;
    let found = rustix::fs::openat2(&root, sub_path, folder, Mode::empty(), inside);
    let found = found.map_err(|error| {
        let why = crate::child::text(&error.into());
        invalid(format!("{what}: folder {} of the image: {why}", sub_path.display()))
    })?;
    let tree = step(open_tree(&found, "", clone | OpenTreeFlags::AT_EMPTY_PATH), what)?;
    step(unmount(staging, UnmountFlags::DETACH), what)?;
    Ok(tree)
}

/// Puts an id-mapped mount of a layer in its place, in this process's mount namespace.
fn cover_mapped(layer: &Path, user_namespace: BorrowedFd<'_>) -> Result<(), Failure> {
    let what = format!("map ids of the layer {}", layer.display());
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = step(open_tree(CWD, layer, flags), &what)?;
    step(mount_attr::map_ids(tree.as_fd(), user_namespace), &what)?;
    attach(&tree, layer, "layer")
}

/// Makes the container's root this process's root, with all mounts and devices.
pub fn enter(plan: &ContainerPlan, taken: Taken) -> Result<(), Failure> {
    let Taken { root, trees } = taken;
    let mut all = Vec::with_capacity(trees.len());
    for (wanted, tree) in plan.mounts.iter().zip(trees) {
        all.push(match tree {
            Some(tree) => tree,
            // Before the guest's own are gone: the kernel makes no proc or sysfs for a user
            // namespace that cannot see one already.
            None => {
                let tree = detached(wanted)?;
                set_flags(&tree, wanted)?;
                tree
            }
        });
    }
    attach(&root, &plan.staging, "rootfs")?;
    drop(root);
    pivot(&plan.staging)?;
    for (wanted, tree) in plan.mounts.iter().zip(all) {
        let target = mountpoint(&wanted.destination, &tree)?;
        attach(&tree, &target, &wanted.destination.display().to_string())?;
    }
    rustix::process::umask(Mode::empty());
    for device in &plan.devices {
        // Those of a new /dev are there already.
        if !plan.standard_devices || !device.path.starts_with(DEV) {
            let what = format!("device {}", device.path.display());
            make_device(CWD, &step(resolve(&device.path), what)?, device)?;
        }
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    if plan.root_propagation != propagation::PRIVATE {
        let root = step(open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC), "/")?;
        let wish = Change { propagation: plan.root_propagation, ..Change::default() };
        step(mount_attr::change(root.as_fd(), wish), "propagation of /")?;
    }
    Ok(())
}

/// Hides and protects paths; the last step but the root's own read-only flag.
pub fn protect(plan: &ContainerPlan) -> Result<(), Failure> {
    for path in &plan.readonly {
        let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = match open_tree(CWD, path, flags) {
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            tree => step(tree, format_args!("read-only path {}", path.display()))?,
        };
        let wish = Change { set: flag::RDONLY, recursive: true, ..Change::default() };
        step(
            mount_attr::change(tree.as_fd(), wish),
            format_args!("read-only path {}", path.display()),
        )?;
        attach(&tree, path, "read-only path")?;
    }
    for path in &plan.masked {
        let what = format_args!("masked path {}", path.display());
        match fs::metadata(path) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) => {}
            Err(error) => return step(Err(error), what),
            Ok(found) if found.is_dir() => {
                let flags = MountFlags::RDONLY
                    | MountFlags::NOSUID
                    | MountFlags::NODEV
                    | MountFlags::NOEXEC;
                step(mount("tmpfs", path, "tmpfs", flags, Some(c"nr_blocks=1,nr_inodes=1")), what)?;
            }
            Ok(_) => attach(&null_device()?, path, "masked path")?,
        }
    }
    Ok(())
}

/// Makes the root mount itself read-only, not what is mounted below it.
pub fn make_root_readonly() -> Result<(), Failure> {
    let root = step(open_tree(CWD, "/", OpenTreeFlags::OPEN_TREE_CLOEXEC), "/")?;
    let wish = Change { set: flag::RDONLY, ..Change::default() };
    step(mount_attr::change(root.as_fd(), wish), "read-only root")
}

/// Makes an empty, read-only folder the root; `staging` is any folder of the old one.
pub fn enter_empty(staging: &Path) -> Result<(), Failure> {
    let none: &[(String, Option<String>)] = &[];
    let root = step(new_file_system("tmpfs", "empty", none), "empty root")?;
    step(
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC),
        "cut the mount namespace off",
    )?;
    attach(&root, staging, "empty root")?;
    pivot(staging)?;
    make_root_readonly()
}

/// Mounts what is mounted at `shown` at `staging`, without what is mounted below it; for this
/// process's mount namespace alone.
pub fn show_alone(shown: &Path, staging: &Path) -> Result<(), Failure> {
    let what = shown.display().to_string();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = step(open_tree(CWD, shown, flags), &what)?;
    let alone = Change { propagation: propagation::PRIVATE, ..Change::default() };
    step(mount_attr::change(tree.as_fd(), alone), &what)?;
    step(
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC),
        "cut the mount namespace off",
    )?;
    attach(&tree, staging, &what)
}

fn pivot(new_root: &Path) -> Result<(), Failure> {
    step(rustix::process::chdir(new_root), "chdir to the rootfs")?;
    // The old root ends up stacked on the new one and is taken away again.
    step(rustix::process::pivot_root(".", "."), "pivot_root")?;
    step(unmount(".", UnmountFlags::DETACH), "detach the old root")?;
    step(rustix::process::chdir("/"), "chdir /")
}

/// A mount that is nowhere yet, from the node's mount namespace.
fn of_node(wanted: &Mount, node_mounts: Option<BorrowedFd<'_>>) -> Result<OwnedFd, Failure> {
    let what = format!("mount {}", wanted.destination.display());
    let Some(node) = node_mounts else {
        return Err(invalid(format!("{what}: the agent was given no mount namespace of the node")));
    };
    let own = step(fs::File::open("/proc/thread-self/ns/mnt"), "own mount namespace")?;
    step(clone3::join(node, namespace::MOUNT), "enter the node's mount namespace")?;
    let tree = detached(wanted);
    step(clone3::join(own.as_fd(), namespace::MOUNT), "leave the node's mount namespace")?;
    tree
}

/// A mount that is nowhere yet, without its flags.
fn detached(wanted: &Mount) -> Result<OwnedFd, Failure> {
    let what = format!("mount {}", wanted.destination.display());
    let tree = match &wanted.kind {
        MountKind::Bind { source, recursive, .. } => {
            let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
            if *recursive {
                flags |= OpenTreeFlags::AT_RECURSIVE;
            }
            step(open_tree(CWD, source, flags), format_args!("{what} from {}", source.display()))?
        }
        MountKind::New { kind, source, options } => {
            step(new_file_system(kind, source, options), format_args!("{what} of type {kind}"))?
        }
        MountKind::Image { .. } => return Err(invalid(format!("{what}: its image is not there"))),
    };
    Ok(tree)
}

fn set_flags(tree: &OwnedFd, wanted: &Mount) -> Result<(), Failure> {
    for change in &wanted.changes {
        let what = format_args!("mount {}: flags", wanted.destination.display());
        step(mount_attr::change(tree.as_fd(), (*change).into()), what)?;
    }
    Ok(())
}

fn new_file_system(
    kind: &str,
    source: &str,
    options: &[(String, Option<String>)],
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let configure = || -> rustix::io::Result<OwnedFd> {
        fsconfig_set_string(&context, "source", source)?;
        for (name, value) in options {
            match value {
                Some(value) => fsconfig_set_string(&context, name.as_str(), value.as_str())?,
                None => fsconfig_set_flag(&context, name.as_str())?,
            }
        }
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    configure().map_err(|errno| explained(errno, &context))
}

/// The kernel's own explanation, which it leaves in the context, beside the number.
fn explained(errno: Errno, context: &OwnedFd) -> io::Error {
    let mut words = [0; 1024];
    let mut lines = String::new();
    while let Ok(length @ 1..) = rustix::io::read(context, &mut words) {
        lines.push_str(": ");
        lines.push_str(String::from_utf8_lossy(&words[..length]).trim_end());
    }
    let error = io::Error::from(errno);
    if lines.is_empty() {
        error
    } else {
        io::Error::new(error.kind(), format!("{}{lines}", crate::child::text(&error)))
    }
}

fn overlay(plan: &ContainerPlan) -> Result<OwnedFd, Failure> {
    let path = |path: &Path| Some(path.display().to_string());
    let mut options = Vec::with_capacity(plan.layers.len() + 3);
    for layer in &plan.layers {
        options.push(("lowerdir+".to_owned(), path(layer)));
    }
    options.push(("upperdir".to_owned(), path(&plan.upper)));
    options.push(("workdir".to_owned(), path(&plan.work)));
    // The writable layer does not outlive the sandbox, so nothing in it needs to reach the disk.
    options.push(("volatile".to_owned(), None));
    step(new_file_system("overlay", "overlay", &options), "rootfs")
}

fn attach(tree: &OwnedFd, target: &Path, what: &str) -> Result<(), Failure> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    step(
        move_mount(tree, "", CWD, target, flags),
        format_args!("mount {what} at {}", target.display()),
    )
}

/// The place for a mount, made when it is missing: a folder for a folder, else a file.
fn mountpoint(destination: &Path, tree: &OwnedFd) -> Result<PathBuf, Failure> {
    let what = format!("mount point {}", destination.display());
    let target = step(resolve(destination), &what)?;
    let kind = FileType::from_raw_mode(step(rustix::fs::fstat(tree), &what)?.st_mode);
    match fs::metadata(&target) {
        Ok(found) if found.is_dir() == (kind == FileType::Directory) => return Ok(target),
        Ok(_) => {
            return Err(invalid(format!(
                "{what}: a folder cannot be mounted on a file, nor a file on a folder"
            )));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return step(Err(error), what),
    }
    if kind == FileType::Directory {
        step(fs::create_dir_all(&target), what)?;
    } else {
        if let Some(parent) = target.parent() {
            step(fs::create_dir_all(parent), &what)?;
        }
        step(fs::File::create(&target), what)?;
    }
    Ok(target)
}

/// Follows every link of an absolute path, also those that lead to what does not exist yet.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let split = |path: &Path| -> Vec<OsString> {
        path.components().rev().map(|part| part.as_os_str().to_owned()).collect()
    };
    let mut rest = split(path);
    let mut done = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = rest.pop() {
        match Path::new(&part).components().next() {
            Some(Component::RootDir) => done = PathBuf::from("/"),
            Some(Component::ParentDir) => {
                done.pop();
            }
            Some(Component::Normal(name)) => {
                done.push(name);
                match fs::read_link(&done) {
                    Ok(link) => {
                        links += 1;
                        if links > 40 {
                            return Err(Errno::LOOP.into());
                        }
                        done.pop();
                        rest.extend(split(&link));
                    }
                    // Not a link, or not there.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::InvalidInput
                                | io::ErrorKind::NotFound
                                | io::ErrorKind::NotADirectory
                        ) => {}
                    Err(error) => return Err(error),
                }
            }
            _ => {}
        }
    }
    Ok(done)
}

/// Puts device nodes and links into a new /dev. It need not be mounted anywhere, and so the guest
/// can do it before a user namespace is entered that may make no nodes.
fn fill_dev(dev: &OwnedFd, devices: &[Device]) -> Result<(), Failure> {
    rustix::process::umask(Mode::empty());
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        let device = Device {
            path: Path::new(DEV).join(name),
            kind: DeviceKind::Char,
            major,
            minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        };
        make_device(dev, Path::new(name), &device)?;
    }
    for (link, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ] {
        step(rustix::fs::symlinkat(to, dev, link), format_args!("/dev/{link}"))?;
    }
    for device in devices {
        if let Ok(name) = device.path.strip_prefix(DEV) {
            make_device(dev, name, device)?;
        }
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// Makes a node at `target` below `folder`. A mount or node that is there already is stronger.
fn make_device(folder: impl AsFd, target: &Path, device: &Device) -> Result<(), Failure> {
    let what = format!("device {}", device.path.display());
    let mut parents: Vec<_> = target.ancestors().skip(1).collect();
    parents.retain(|parent| !matches!(parent.to_str(), Some("" | "/")));
    for parent in parents.into_iter().rev() {
        match rustix::fs::mkdirat(&folder, parent, Mode::from_raw_mode(0o755)) {
            Err(Errno::EXIST) => {}
            result => step(result, &what)?,
        }
    }
    let (kind, number) = match device.kind {
        DeviceKind::Block => (FileType::BlockDevice, makedev(device.major, device.minor)),
        DeviceKind::Char => (FileType::CharacterDevice, makedev(device.major, device.minor)),
        DeviceKind::Fifo => (FileType::Fifo, 0),
    };
    match rustix::fs::mknodat(&folder, target, kind, Mode::from_raw_mode(device.mode), number) {
        Err(Errno::EXIST) => return Ok(()),
        result => step(result, &what)?,
    }
    let (uid, gid) = (rustix::fs::Uid::from_raw(device.uid), rustix::fs::Gid::from_raw(device.gid));
    if device.uid != 0 || device.gid != 0 {
        step(
            rustix::fs::chownat(&folder, target, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW),
            &what,
        )?;
    }
    Ok(())
}

/// The container's /dev/null, if it is one: an image or a mount may have put something else there.
fn null_device() -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let null = step(rustix::fs::open("/dev/null", flags, Mode::empty()), "/dev/null")?;
    let found = step(fs::metadata("/dev/null"), "/dev/null")?;
    let stat = step(rustix::fs::fstat(&null), "/dev/null")?;
    if !found.file_type().is_char_device()
        || stat.st_rdev != makedev(1, 3)
        || found.ino() != stat.st_ino
    {
        return Err(invalid("masked paths: /dev/null of the container is not the null device"));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    step(open_tree(&null, "", flags), "/dev/null")
}

/// Reads at most `limit` bytes of a file of the container; nothing when it is not there.
pub fn read_small(path: &str, limit: u64) -> io::Result<Option<String>> {
    let file = match fs::File::open(path) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Ok(None);
        }
        file => file?,
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
