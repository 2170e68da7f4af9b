//! A layer's archive becomes a folder that can be packed as an overlay layer.
//!
//! The folder is private while it is filled and nothing in it is ever followed out of it: a path is walked
//! part by part without following links, and a link in the middle is resolved by hand with the folder as
//! its root, as it will be in the container. A deletion (`.wh.NAME`) becomes a character device 0:0, an
//! emptied folder (`.wh..wh..opq`) gets `trusted.overlay.opaque`. Deletions speak about the layers below
//! only: what the same archive also brings stays, in any order.
//!
//! Extended attributes: what could steer overlay or the node (`trusted.*`, SELinux labels) is left out.

use crate::{
    entry::{Archive, ArchiveError, Entry, EntryKind},
    path::{components, is_below, join},
};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
        chownat, fchmod, fchown, fsetxattr, futimens, linkat, makedev, mkdirat, mknodat, open,
        openat, readlinkat, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::OsStr,
    fs, io,
    io::Read,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    rc::Rc,
};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
const OPAQUE: &str = "trusted.overlay.opaque";
/// No program could use a longer path, and tools that read the folder use paths.
const LONGEST_PATH: usize = 3900;
const MOST_LINKS: usize = 255;

/// A layer could not be unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    /// It is the archive's fault.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The node's file system refused.
    #[error("{step} {path} of the layer")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
}

/// Owner, permissions and so on of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

impl Attributes {
    /// Of a folder that an archive uses and does not describe.
    pub fn implied() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new() }
    }
}

/// What a layer says about folders, for layers above it that use them without describing them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Summary {
    /// Folders it describes.
    pub described: BTreeMap<String, Attributes>,
    /// Folders it only uses.
    pub implied: BTreeSet<String>,
    /// What it deletes, and folders of which it hides what is below.
    pub deleted: BTreeSet<String>,
    pub opaque: BTreeSet<String>,
}

/// A folder being filled.
pub(crate) struct Tree {
    path: PathBuf,
    root: Rc<OwnedFd>,
    folders: BTreeMap<Vec<u8>, Folder>,
    /// Deletions made, as paths.
    whiteouts: BTreeSet<Vec<u8>>,
    /// The folder the last entry was in: mostly the next one's, too.
    last: Option<(Vec<Vec<u8>>, Place)>,
}

struct Folder {
    attributes: Attributes,
    implied: bool,
    opaque: bool,
}

/// An open folder and its path without links.
#[derive(Clone)]
struct Place {
    folder: Rc<OwnedFd>,
    path: Vec<u8>,
}

/// Unpacks the whole archive into `folder`, which exists and is empty.
pub(crate) fn unpack(archive: impl Read, folder: &Path) -> Result<Summary, UnpackError> {
    let mut archive = Archive::new(archive);
    let mut tree = Tree::open(folder)?;
    while let Some(entry) = archive.next()? {
        tree.add(&entry, &mut archive.data())?;
    }
    tree.finish()
}

impl Tree {
    pub fn open(path: &Path) -> Result<Self, UnpackError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(|error| failed("open", b"/", error))?;
        Ok(Self {
            path: path.to_owned(),
            root: Rc::new(root),
            folders: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
            last: None,
        })
    }

    fn add(&mut self, entry: &Entry, data: &mut impl Read) -> Result<(), UnpackError> {
        let Some(mut parts) = components(&entry.path) else {
            return bad(&entry.path, "leads out of the layer");
        };
        let Some(name) = parts.pop() else {
            // The layer's root; the guest decides about the root of a container, but layers may be looked at.
            return match entry.kind {
                EntryKind::Directory => self.describe(&Place::root(&self.root), entry),
                _ => bad(&entry.path, "replaces the root of the layer"),
            };
        };
        let place = self.enter(&parts)?;
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.delete(&place, name, hidden);
        }
        let path = join(&place.path, name);
        if path.len() > LONGEST_PATH {
            return bad(&path, "is too long a path");
        }
        self.create(entry, &place, name, &path, data)
    }

    fn create(
        &mut self,
        entry: &Entry,
        place: &Place,
        name: &[u8],
        path: &[u8],
        data: &mut impl Read,
    ) -> Result<(), UnpackError> {
        let at = place.folder.as_fd();
        let source = match entry.kind {
            EntryKind::Hardlink => Some(self.link_source(entry)?),
            _ => None,
        };
        if source.as_ref().is_some_and(|(from, last)| join(&from.path, last) == path) {
            return Ok(());
        }
        let (existed, hides) = self.make_room(place, name, path, entry.kind)?;
        let file = name_of(name);
        match entry.kind {
            EntryKind::Directory => {
                if !existed {
                    mkdirat(at, file, Mode::from_raw_mode(0o700))
                        .map_err(|error| failed("create", path, error))?;
                }
                let folder = Place {
                    folder: Rc::new(
                        open_folder(at, name).map_err(|error| failed("open", path, error))?,
                    ),
                    path: path.to_vec(),
                };
                self.describe(&folder, entry)?;
                if hides {
                    self.make_opaque(&folder)?;
                }
                return Ok(());
            }
            EntryKind::File => return write_file(entry, at, name, path, data),
            EntryKind::Hardlink => {
                if let Some((from, last)) = source {
                    linkat(&from.folder, name_of(&last), at, file, AtFlags::empty()).map_err(
                        |error| match error {
                            Errno::PERM => archive(path, "is a hard link to a folder"),
                            error => failed("link", path, error),
                        },
                    )?;
                }
                return Ok(());
            }
            EntryKind::Symlink => {
                symlinkat(name_of(&entry.link), at, file).map_err(|error| match error {
                    Errno::NOENT | Errno::NAMETOOLONG | Errno::INVAL => {
                        archive(path, "is a link to no path")
                    }
                    error => failed("create", path, error),
                })?;
            }
            EntryKind::Character => make_node(at, file, FileType::CharacterDevice, entry, path)?,
            EntryKind::Block => make_node(at, file, FileType::BlockDevice, entry, path)?,
            EntryKind::Fifo => make_node(at, file, FileType::Fifo, entry, path)?,
        }
        let (uid, gid) = owner(entry.uid, entry.gid);
        chownat(at, file, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed("chown", path, error))?;
        if entry.kind != EntryKind::Symlink {
            chmodat(at, file, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(|error| failed("chmod", path, error))?;
        }
        utimensat(at, file, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed("set the time of", path, error))
    }

    /// Removes what an entry replaces. Whether a folder is there already, and whether a deletion was: then a
    /// new folder hides what is below.
    fn make_room(
        &mut self,
        place: &Place,
        name: &[u8],
        path: &[u8],
        kind: EntryKind,
    ) -> Result<(bool, bool), UnpackError> {
        let file = name_of(name);
        let existing = match statat(&place.folder, file, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            Err(Errno::NOENT) => return Ok((false, false)),
            Err(Errno::NAMETOOLONG) => {
                return bad(path, "has too long a name").map(|()| (false, false));
            }
            Err(error) => return Err(failed("look at", path, error)),
        };
        if existing == FileType::Directory {
            if kind == EntryKind::Directory {
                return Ok((true, false));
            }
            let whole = self.path.join(name_of(path));
            fs::remove_dir_all(&whole).map_err(|source| UnpackError::Io {
                step: "replace",
                path: name_of(path).into(),
                source,
            })?;
            self.last = None;
            let gone = |other: &[u8]| other == path || is_below(other, path);
            self.folders.retain(|other, _| !gone(other));
            self.whiteouts.retain(|other| !gone(other));
            return Ok((false, false));
        }
        unlinkat(&place.folder, file, AtFlags::empty())
            .map_err(|error| failed("replace", path, error))?;
        // A link may have been on the way to the last folder.
        self.last = None;
        Ok((false, self.whiteouts.remove(path)))
    }

    /// `.wh.NAME`, or one of the markers that begin with `.wh..wh.`.
    fn delete(&mut self, place: &Place, marker: &[u8], hidden: &[u8]) -> Result<(), UnpackError> {
        if marker == OPAQUE_MARKER {
            return self.make_opaque(place);
        }
        if marker.starts_with(WHITEOUT_META) {
            // The book-keeping of AUFS.
            return Ok(());
        }
        let path = join(&place.path, hidden);
        if matches!(hidden, b"" | b"." | b"..") {
            return bad(&join(&place.path, marker), "deletes nothing that has a name");
        }
        match statat(&place.folder, name_of(hidden), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {
                let mode = Mode::from_raw_mode(0);
                mknodat(&place.folder, name_of(hidden), FileType::CharacterDevice, mode, 0)
                    .map_err(|error| failed("delete", &path, error))?;
                self.whiteouts.insert(path);
                Ok(())
            }
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                let folder = open_folder(place.folder.as_fd(), hidden)
                    .map_err(|error| failed("open", &path, error))?;
                self.make_opaque(&Place { folder: Rc::new(folder), path })
            }
            // This archive brings another one.
            Ok(_) => Ok(()),
            Err(error) => Err(failed("look at", &path, error)),
        }
    }

    fn make_opaque(&mut self, place: &Place) -> Result<(), UnpackError> {
        let file = readable(place)?;
        fsetxattr(&file, OPAQUE, b"y", XattrFlags::empty())
            .map_err(|error| failed("empty", &place.path, error))?;
        let folder = self.folders.entry(place.path.clone()).or_insert_with(Folder::implied);
        folder.opaque = true;
        Ok(())
    }

    /// Gives a folder the attributes of its entry, except for the time: that would change again.
    fn describe(&mut self, place: &Place, entry: &Entry) -> Result<(), UnpackError> {
        let xattrs = kept(&entry.xattrs);
        let attributes = Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattrs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        };
        self.set(place, attributes)
    }

    fn set(&mut self, place: &Place, attributes: Attributes) -> Result<(), UnpackError> {
        let file = readable(place)?;
        let (uid, gid) = owner(attributes.uid, attributes.gid);
        fchown(&file, uid, gid).map_err(|error| failed("chown", &place.path, error))?;
        fchmod(&file, Mode::from_raw_mode(attributes.mode))
            .map_err(|error| failed("chmod", &place.path, error))?;
        for (name, value) in &attributes.xattrs {
            set_xattr(&file, name, value, &place.path)?;
        }
        let opaque = self.folders.get(&place.path).is_some_and(|folder| folder.opaque);
        let folder = Folder { attributes, implied: false, opaque };
        self.folders.insert(place.path.clone(), folder);
        Ok(())
    }

    /// A folder with these attributes, for a layer that is not made from an archive. Parents come first.
    pub fn folder(&mut self, path: &str, attributes: Attributes) -> Result<(), UnpackError> {
        let parts = components(path.as_bytes()).unwrap_or_default();
        let place = self.enter(&parts)?;
        self.set(&place, attributes)
    }

    /// Where the source of a hard link is. Nothing is made on the way.
    fn link_source(&self, entry: &Entry) -> Result<(Place, Vec<u8>), UnpackError> {
        let lost = || {
            let target = String::from_utf8_lossy(&entry.link).into_owned();
            archive(&entry.path, &format!("is a hard link to {target}, which is not in the layer"))
        };
        let mut parts = components(&entry.link).ok_or_else(lost)?;
        let name = parts.pop().ok_or_else(lost)?.to_vec();
        let place = self.walk(&parts, |_, _| Ok(None))?.ok_or_else(lost)?;
        match statat(&place.folder, name_of(&name), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok((place, name)),
            Err(_) => Err(lost()),
        }
    }

    /// Opens the folder at a path, making what is missing of it.
    fn enter(&mut self, parts: &[&[u8]]) -> Result<Place, UnpackError> {
        if let Some((last, place)) = &self.last
            && last == parts
        {
            return Ok(place.clone());
        }
        let mut made = Vec::new();
        let place = self.walk(parts, |place, name| {
            let path = join(&place.path, name);
            if path.len() > LONGEST_PATH {
                return bad(&path, "is too long a path").map(|()| None);
            }
            // A deletion of this archive may be in the way: then the folder hides what is below.
            let hides = self.whiteouts.contains(&path);
            if hides {
                unlinkat(&place.folder, name_of(name), AtFlags::empty())
                    .map_err(|error| failed("replace", &path, error))?;
            }
            mkdirat(&place.folder, name_of(name), Mode::from_raw_mode(0o755)).map_err(|error| {
                match error {
                    Errno::EXIST => archive(&path, "is used as a folder and is none"),
                    Errno::NAMETOOLONG => archive(&path, "has too long a name"),
                    error => failed("create", &path, error),
                }
            })?;
            let folder = Rc::new(
                open_folder(place.folder.as_fd(), name)
                    .map_err(|error| failed("open", &path, error))?,
            );
            let made_place = Place { folder, path };
            made.push((made_place.clone(), hides));
            Ok(Some(made_place))
        })?;
        for (place, hides) in made {
            let file = readable(&place)?;
            let (uid, gid) = owner(0, 0);
            fchown(&file, uid, gid).map_err(|error| failed("chown", &place.path, error))?;
            fchmod(&file, Mode::from_raw_mode(0o755))
                .map_err(|error| failed("chmod", &place.path, error))?;
            self.folders.insert(place.path.clone(), Folder::implied());
            if hides {
                self.whiteouts.remove(&place.path);
                self.make_opaque(&place)?;
            }
        }
        match place {
            Some(place) => {
                self.last = Some((parts.iter().map(|part| part.to_vec()).collect(), place.clone()));
                Ok(place)
            }
            None => bad(&parts.join(&b'/'), "cannot be entered").map(|()| Place::root(&self.root)),
        }
    }

    /// Walks along a path, with links resolved as if this folder were the root. `missing` is asked for each
    /// part that is no folder and no link, and may make one.
    fn walk(
        &self,
        parts: &[&[u8]],
        mut missing: impl FnMut(&Place, &[u8]) -> Result<Option<Place>, UnpackError>,
    ) -> Result<Option<Place>, UnpackError> {
        let mut way: Vec<Place> = vec![Place::root(&self.root)];
        let mut rest: VecDeque<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let Some(place) = way.last() else { return Ok(None) };
            let next = match open_folder(place.folder.as_fd(), &name) {
                Ok(folder) => {
                    Some(Place { folder: Rc::new(folder), path: join(&place.path, &name) })
                }
                Err(Errno::NOENT) => missing(place, &name)?,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    match readlinkat(&place.folder, name_of(&name), Vec::new()) {
                        Ok(target) => {
                            links += 1;
                            if links > MOST_LINKS {
                                return bad(&join(&place.path, &name), "is a link in a circle")
                                    .map(|()| None);
                            }
                            if target.as_bytes().starts_with(b"/") {
                                way.truncate(1);
                            }
                            let parts = target.as_bytes().split(|&c| c == b'/');
                            for part in parts.rev().filter(|part| !matches!(*part, b"" | b".")) {
                                rest.push_front(part.to_vec());
                            }
                            continue;
                        }
                        Err(_) => missing(place, &name)?,
                    }
                }
                Err(Errno::NAMETOOLONG) => {
                    return bad(&join(&place.path, &name), "has too long a name").map(|()| None);
                }
                Err(error) => return Err(failed("open", &join(&place.path, &name), error)),
            };
            match next {
                Some(next) => way.push(next),
                None => return Ok(None),
            }
        }
        Ok(way.pop())
    }

    /// Sets the folders' times, now that nothing is added any more, and tells about them.
    pub fn finish(self) -> Result<Summary, UnpackError> {
        let mut summary = Summary::default();
        for (path, folder) in self.folders {
            let file = if path.is_empty() { name_of(b".") } else { name_of(&path) };
            utimensat(
                &*self.root,
                file,
                &times(folder.attributes.mtime),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(|error| failed("set the time of", &path, error))?;
            // A name that is no text cannot be looked up from another layer; nobody has such folders.
            let Ok(path) = String::from_utf8(path) else { continue };
            if folder.opaque {
                summary.opaque.insert(path.clone());
            }
            if folder.implied {
                summary.implied.insert(path);
            } else {
                summary.described.insert(path, folder.attributes);
            }
        }
        summary.deleted =
            self.whiteouts.into_iter().filter_map(|path| String::from_utf8(path).ok()).collect();
        Ok(summary)
    }
}

impl Place {
    fn root(root: &Rc<OwnedFd>) -> Self {
        Self { folder: root.clone(), path: Vec::new() }
    }
}

impl Folder {
    fn implied() -> Self {
        Self { attributes: Attributes::implied(), implied: true, opaque: false }
    }
}

fn write_file(
    entry: &Entry,
    at: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    data: &mut impl Read,
) -> Result<(), UnpackError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(at, name_of(name), flags, Mode::from_raw_mode(0o600))
        .map_err(|error| failed("create", path, error))?;
    let mut file = fs::File::from(file);
    let mut buffer = vec![0; 128 << 10];
    let mut rest = entry.size;
    while rest > 0 {
        let count = match data.read(&mut buffer) {
            Ok(0) => return bad(path, "ends early"),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(ArchiveError::Read(error).into()),
        };
        io::Write::write_all(&mut file, &buffer[..count]).map_err(|source| UnpackError::Io {
            step: "write",
            path: name_of(path).into(),
            source,
        })?;
        rest -= count as u64;
    }
    // In this order: a change of owner takes away set-user-id and capabilities.
    let (uid, gid) = owner(entry.uid, entry.gid);
    fchown(&file, uid, gid).map_err(|error| failed("chown", path, error))?;
    fchmod(&file, Mode::from_raw_mode(entry.mode)).map_err(|error| failed("chmod", path, error))?;
    for (name, value) in kept(&entry.xattrs) {
        set_xattr(file.as_fd(), name, value, path)?;
    }
    futimens(&file, &times(entry.mtime)).map_err(|error| failed("set the time of", path, error))
}

fn make_node(
    at: BorrowedFd<'_>,
    file: &Path,
    kind: FileType,
    entry: &Entry,
    path: &[u8],
) -> Result<(), UnpackError> {
    let device = makedev(entry.device.0, entry.device.1);
    mknodat(at, file, kind, Mode::from_raw_mode(0o600), device)
        .map_err(|error| failed("create", path, error))
}

/// Attributes that mean the same in a container and cannot steer overlay or the node.
fn kept(xattrs: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = (&str, &[u8])> {
    xattrs.iter().filter_map(|(name, value)| {
        let name = std::str::from_utf8(name).ok().filter(|name| !name.contains('\0'))?;
        let good = name.starts_with("user.") && !name.starts_with("user.overlay.")
            || name == "security.capability"
            || name.starts_with("system.posix_acl_");
        if !good {
            tracing::debug!(name, "extended attribute of a layer left out");
        }
        good.then_some((name, value.as_slice()))
    })
}

fn set_xattr(file: impl AsFd, name: &str, value: &[u8], path: &[u8]) -> Result<(), UnpackError> {
    match fsetxattr(file, name, value, XattrFlags::empty()) {
        // Programs without their capabilities fail in strange ways; without the others they run.
        Err(Errno::NOTSUP) if name != "security.capability" => {
            tracing::debug!(name, "extended attribute not supported by this node's file system");
            Ok(())
        }
        Err(Errno::INVAL) => bad(path, &format!("has an attribute {name} that means nothing")),
        other => other.map_err(|error| failed("set an attribute of", path, error)),
    }
}

fn open_folder(at: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(at, name_of(name), flags, Mode::empty())
}

/// The folder opened so that its attributes can be set.
fn readable(place: &Place) -> Result<OwnedFd, UnpackError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(&place.folder, c".", flags, Mode::empty())
        .map_err(|error| failed("open", &place.path, error))
}

fn name_of(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

fn owner(uid: u32, gid: u32) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

fn archive(path: &[u8], why: &str) -> UnpackError {
    let path = String::from_utf8_lossy(path);
    let short: String = path.chars().take(300).collect();
    ArchiveError::Malformed(format!("{short} {why}")).into()
}

fn bad(path: &[u8], why: &str) -> Result<(), UnpackError> {
    Err(archive(path, why))
}

fn failed(step: &'static str, path: &[u8], error: Errno) -> UnpackError {
    UnpackError::Io { step, path: name_of(path).into(), source: error.into() }
}

#[cfg(test)]
mod tests;
