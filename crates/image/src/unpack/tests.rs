use super::*;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use tar::{Builder, EntryType, Header};

/// An archive in the making.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, kind: EntryType, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(1);
        header.set_gid(2);
        header.set_mtime(3);
        header.set_size(data.len() as u64);
        // As bytes: a hostile archive's paths are not checked by who made it.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, path: &str, data: &str) -> Self {
        self.add(EntryType::Regular, path, "", data.as_bytes())
    }

    fn folder(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"")
    }

    fn link(self, path: &str, to: &str) -> Self {
        self.add(EntryType::Symlink, path, to, b"")
    }

    fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.0.append_pax_extensions([(format!("SCHILY.xattr.{name}").as_str(), value)]).unwrap();
        self
    }

    fn unpack(self) -> (tempfile::TempDir, Result<Summary, UnpackError>) {
        let folder = tempfile::tempdir().unwrap();
        let summary = unpack(&*self.0.into_inner().unwrap(), folder.path());
        (folder, summary)
    }

    fn refused(self, word: &str) {
        let (folder, summary) = self.unpack();
        let error = summary.expect_err(word).to_string();
        assert!(error.contains(word), "{word}: {error}");
        drop(folder);
    }
}

fn text(folder: &tempfile::TempDir, path: &str) -> String {
    fs::read_to_string(folder.path().join(path)).unwrap()
}

#[test]
fn files_keep_what_the_archive_says_of_them() {
    let (folder, summary) = Tar::new()
        .folder("d/")
        .file("d/f", "data")
        .add(EntryType::Link, "hard", "d/f", b"")
        .link("soft", "/d/f")
        .add(EntryType::Fifo, "fifo", "", b"")
        .xattr("security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
        .xattr("trusted.overlay.opaque", b"y")
        .file("capable", "")
        .unpack();
    let summary = summary.unwrap();
    let data = folder.path().join("d/f").metadata().unwrap();
    assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777, data.mtime()), (1, 2, 0o640, 3));
    assert_eq!(folder.path().join("hard").metadata().unwrap().ino(), data.ino());
    assert_eq!(fs::read_link(folder.path().join("soft")).unwrap(), Path::new("/d/f"));
    assert!(folder.path().join("fifo").metadata().unwrap().file_type().is_fifo());
    let mut names = vec![0; 1024];
    let count = rustix::fs::listxattr(folder.path().join("capable"), &mut names).unwrap();
    assert_eq!(&names[..count], b"security.capability\0");
    assert_eq!(folder.path().join("d").metadata().unwrap().mtime(), 3);
    assert_eq!(summary.described["d"].mode, 0o640);
}

#[test]
fn deletions_are_overlays_and_speak_of_lower_layers_only() {
    let (folder, summary) = Tar::new()
        .file("kept", "x")
        .file(".wh.kept", "")
        .file("a/.wh.gone", "")
        .file("b/.wh..wh..opq", "")
        .file("b/new", "")
        .file(".wh.c", "")
        .file("c/again", "")
        .file(".wh..wh.aufs", "")
        .unpack();
    let summary = summary.unwrap();
    assert_eq!(text(&folder, "kept"), "x");
    let gone = folder.path().join("a/gone").metadata().unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let opaque = |path: &str| {
        let mut value = [0; 8];
        rustix::fs::getxattr(folder.path().join(path), OPAQUE, &mut value[..])
            .is_ok_and(|count| &value[..count] == b"y")
    };
    assert!(opaque("b") && opaque("c") && !opaque("a"));
    assert!(
        summary.deleted.contains("a/gone")
            && summary.opaque.contains("b")
            && summary.opaque.contains("c")
    );
    assert!(summary.implied.contains("a"));
    assert!(!folder.path().join(".wh..wh.aufs").exists());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let (folder, summary) = Tar::new()
        .file("a", "1")
        .file("a", "2")
        .folder("b")
        .file("b/x", "")
        .file("b", "now a file")
        .link("c", "elsewhere")
        .folder("c")
        .file("c/y", "y")
        .unpack();
    assert!(!summary.unwrap().described.contains_key("b"));
    assert_eq!(text(&folder, "a"), "2");
    assert_eq!(text(&folder, "b"), "now a file");
    assert_eq!(text(&folder, "c/y"), "y");
    assert!(!folder.path().join("elsewhere").exists());
}

#[test]
fn nothing_leaves_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let (folder, summary) = Tar::new()
        .link("out", target)
        .file("out/x", "x")
        .link("up", "../../../..")
        .file("up/y", "y")
        .unpack();
    summary.unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(text(&folder, "y"), "y");
    assert_eq!(text(&folder, &format!("{}/x", &target[1..])), "x");
    Tar::new().file("../x", "").refused("leads out");
    Tar::new().file("a/../../x", "").refused("leads out");
    Tar::new().add(EntryType::Link, "x", "../etc/passwd", b"").refused("not in the layer");
    Tar::new()
        .link("p", "/etc")
        .add(EntryType::Link, "x", "p/passwd", b"")
        .refused("not in the layer");
    Tar::new().link("a", "b").link("b", "a").file("a/x", "").refused("circle");
    Tar::new().file("a", "").file("a/b", "").refused("used as a folder");
    Tar::new().file("", "").refused("root of the layer");
}
