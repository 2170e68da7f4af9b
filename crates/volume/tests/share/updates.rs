//! Volumes that kubelet updates as a whole: read whole, by programs that are woken.

use crate::fixture::volume;
use crate::tests;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

tests![
    every_read_under_updates_is_whole_and_of_one_version,
    whoever_waits_for_an_update_is_woken,
    a_rename_that_nobody_asked_the_guest_for_is_a_rename,
];

const KEYS: [&str; 2] = ["key", "deep/other"];
/// Bytes of a value: more than one page, and than one read ahead.
const LINES: usize = 40_000;
/// For a test that fails.
const LIMIT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// Kubelet's writer.
struct Writer {
    volume: PathBuf,
    version: usize,
}

impl Writer {
    fn new(volume: &Path) -> Result<Self> {
        let mut writer = Self { volume: volume.to_owned(), version: 0 };
        writer.write(LINES)?;
        symlink("..data/key", volume.join("key"))?;
        symlink("..data/deep", volume.join("deep"))?;
        Ok(writer)
    }

    /// A new folder, a new link over the old one, the end of the old folder.
    fn write(&mut self, lines: usize) -> Result<()> {
        self.version += 1;
        let name = format!("..2026_{}", self.version);
        let folder = self.volume.join(&name);
        fs::create_dir_all(folder.join("deep"))?;
        for key in KEYS {
            fs::write(folder.join(key), format!("{:09}\n", self.version).repeat(lines / 10))?;
        }
        symlink(&name, self.volume.join("..data_tmp"))?;
        fs::rename(self.volume.join("..data_tmp"), self.volume.join("..data"))?;
        let old = self.volume.join(format!("..2026_{}", self.version - 1));
        if old.exists() {
            fs::remove_dir_all(old)?;
        }
        Ok(())
    }
}

/// The version that `text` is of as a whole.
fn version(text: &str) -> Result<usize> {
    let first = text.lines().next().context("empty")?;
    ensure!(text.len() == LINES, "{} bytes of version {first}", text.len());
    ensure!(text.lines().all(|line| line == first), "two versions in one read");
    Ok(first.parse()?)
}

fn every_read_under_updates_is_whole_and_of_one_version() -> Result<()> {
    let (pod, host, guest) = volume()?;
    let mut writer = Writer::new(&host)?;
    pod.orders.watch(Path::new("volumes/c/0"))?;
    let (over, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut last = 0;
                    while !over.load(Ordering::Relaxed) {
                        let Some(both) = read_both(&guest)? else { continue };
                        let [one, other] = both;
                        ensure!(one == other, "versions {one} and {other} in one folder");
                        ensure!(one >= last, "version {one} after {last}");
                        last = one;
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let mut result = Ok(());
        let failed = || readers.iter().any(|reader| reader.is_finished());
        while result.is_ok() && writer.version < 100 && !failed() {
            result = writer.write(LINES);
            let before = reads.load(Ordering::Relaxed);
            // Somebody is in the middle of one whenever the next version comes.
            while reads.load(Ordering::Relaxed) == before && !failed() {
                std::thread::yield_now();
            }
        }
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            let read = reader.join().unwrap_or_else(|_| bail!("a reader panicked"));
            result = result.and(read);
        }
        result
    })?;
    ensure!(fs::read_to_string(guest.join("key"))?.starts_with(&format!("{:09}", writer.version)));
    Ok(())
}

/// Both values, read in the folder of one version; none when that was removed meanwhile.
fn read_both(volume: &Path) -> Result<Option<[usize; 2]>> {
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut versions = [0; 2];
    let opened = rustix::fs::openat(CWD, volume.join("..data"), folder, Mode::empty());
    let folder = match opened {
        Err(Errno::NOENT) => return Ok(None),
        folder => folder?,
    };
    for (key, place) in KEYS.into_iter().zip(&mut versions) {
        let file = rustix::fs::openat(&folder, key, OFlags::RDONLY, Mode::empty());
        let mut file = match file {
            Err(Errno::NOENT) => return Ok(None),
            file => File::from(file?),
        };
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        *place = version(&text).with_context(|| key.to_owned())?;
    }
    Ok(Some(versions))
}

/// An inotify instance and what it has told.
struct Waiter {
    inotify: OwnedFd,
    told: Vec<(i32, ReadFlags, Option<String>)>,
}

impl Waiter {
    fn new() -> Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { inotify, told: Vec::new() })
    }

    fn watch(&self, path: &Path) -> Result<i32> {
        Ok(inotify::add_watch(&self.inotify, path, WatchFlags::ALL_EVENTS)?)
    }

    /// Waits for an event of `wanted` about `name`.
    fn wait_for(&mut self, watch: i32, wanted: ReadFlags, name: Option<&str>) -> Result<()> {
        let same = |(wd, events, told): &(i32, ReadFlags, Option<String>)| {
            *wd == watch && told.as_deref() == name && events.intersects(wanted)
        };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        while !self.told.iter().any(same) {
            let ready = poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], Some(&LIMIT))?;
            ensure!(ready > 0, "no {wanted:?} of {name:?}, only {:?}", self.told);
            let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let name = event.file_name();
                        let name = name.map(|name| name.to_string_lossy().into_owned());
                        self.told.push((event.wd(), event.events(), name));
                    }
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

fn whoever_waits_for_an_update_is_woken() -> Result<()> {
    let (pod, host, guest) = volume()?;
    let mut writer = Writer::new(&host)?;
    pod.orders.watch(Path::new("volumes/c/0"))?;
    for round in 0..30 {
        let mut waiter = Waiter::new()?;
        let folder = waiter.watch(&guest)?;
        // Follows the links to the files of this version, and reads as programs do.
        let (file, deep) =
            (waiter.watch(&guest.join("key"))?, waiter.watch(&guest.join("deep/other"))?);
        version(&fs::read_to_string(guest.join("key"))?)?;
        writer.write(LINES)?;
        waiter
            .wait_for(folder, ReadFlags::MOVED_TO, Some("..data"))
            .with_context(|| format!("round {round}: the folder"))?;
        for (watch, key) in [(file, "key"), (deep, "deep/other")] {
            waiter
                .wait_for(watch, ReadFlags::DELETE_SELF, None)
                .with_context(|| format!("round {round}: {key}"))?;
            ensure!(version(&fs::read_to_string(guest.join(key))?)? == writer.version);
        }
    }
    pod.orders.unwatch(Path::new("volumes/c"))?;
    writer.write(LINES)?;
    ensure!(version(&fs::read_to_string(guest.join("key"))?)? == writer.version);
    Ok(())
}

fn a_rename_that_nobody_asked_the_guest_for_is_a_rename() -> Result<()> {
    let (pod, host, guest) = volume()?;
    Writer::new(&host)?;
    pod.orders.watch(Path::new("volumes/c/0"))?;
    symlink("elsewhere", guest.join("..data_updated"))?;
    fs::rename(guest.join("..data_updated"), guest.join("..data"))?;
    ensure!(fs::read_link(host.join("..data"))? == Path::new("elsewhere"));
    Ok(())
}
