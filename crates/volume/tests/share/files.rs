//! What programs do with files, done in the guest, checked on the host.

use crate::fixture::{Pod, refusal, shell, volume};
use crate::tests;
use a3s_box_volume::{Access, Propagation};
use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

tests![
    files_made_in_the_guest_are_the_hosts,
    metadata_set_in_the_guest_is_the_hosts,
    extended_attributes_go_both_ways,
    links_and_special_files_are_made_and_read,
    renames_can_refuse_and_exchange,
    ten_thousand_entries_are_each_listed_once,
    a_sparse_gigabyte_keeps_its_holes,
    ranges_are_copied_and_space_is_reserved,
    large_files_come_back_as_written,
    direct_and_synchronous_writes_work,
    a_shared_mapping_reaches_the_host,
    programs_run_from_a_volume,
    appends_from_both_sides_lose_nothing,
    locks_hold_between_processes_of_the_guest,
    a_journal_written_as_databases_do_is_whole,
    an_unlinked_file_lives_while_it_is_open,
    a_file_without_a_name_can_get_one,
    users_of_the_guest_own_what_they_make,
    a_group_the_server_does_not_know_may_write,
    a_write_by_another_user_ends_setuid,
    files_of_different_devices_differ_in_number,
    a_read_only_volume_refuses_every_change,
    what_is_mounted_below_a_read_only_volume_is_read_only_when_asked,
    an_image_is_mounted_from_the_share,
    free_space_is_that_of_the_volume,
];

fn files_made_in_the_guest_are_the_hosts() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::create_dir_all(guest.join("a/b"))?;
    fs::write(guest.join("a/b/file"), "one")?;
    ensure!(fs::read(host.join("a/b/file"))? == b"one");
    fs::write(guest.join("a/b/file"), "two, longer")?;
    ensure!(fs::read(host.join("a/b/file"))? == b"two, longer");
    fs::rename(guest.join("a/b/file"), guest.join("moved"))?;
    ensure!(fs::read(host.join("moved"))? == b"two, longer");
    fs::remove_dir(guest.join("a/b"))?;
    ensure!(refusal(fs::remove_dir(guest.join("a/b"))) == Some(Errno::NOENT));
    ensure!(refusal(fs::create_dir(guest.join("moved"))) == Some(Errno::EXIST));
    ensure!(refusal(fs::remove_file(guest.join("a"))) == Some(Errno::ISDIR));
    fs::remove_file(guest.join("moved"))?;
    fs::remove_dir(guest.join("a"))?;
    ensure!(fs::read_dir(&host)?.next().is_none());
    Ok(())
}

fn metadata_set_in_the_guest_is_the_hosts() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let (inside, outside) = (guest.join("f"), host.join("f"));
    fs::write(&inside, "0123456789")?;
    fs::set_permissions(&inside, Permissions::from_mode(0o4751))?;
    ensure!(fs::metadata(&outside)?.mode() & 0o7777 == 0o4751);
    std::os::unix::fs::chown(&inside, Some(1000), Some(2000))?;
    let metadata = fs::metadata(&outside)?;
    ensure!((metadata.uid(), metadata.gid()) == (1000, 2000));
    ensure!(metadata.mode() & 0o7777 == 0o751, "a new owner, no setuid");
    let file = OpenOptions::new().write(true).open(&inside)?;
    file.set_len(4)?;
    ensure!(fs::read(&outside)? == b"0123");
    file.set_len(6)?;
    ensure!(fs::read(&inside)? == b"0123\0\0");
    shell(&guest, 1000, 2000, "", "truncate -s 2 f")?;
    ensure!(fs::metadata(&outside)?.len() == 2);
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_times(fs::FileTimes::new().set_modified(time))?;
    let metadata = fs::metadata(&outside)?;
    ensure!((metadata.mtime(), metadata.mtime_nsec()) == (1_000_000_000, 123_456_789));
    let inside = fs::metadata(&inside)?;
    ensure!((inside.mtime(), inside.mtime_nsec()) == (1_000_000_000, 123_456_789));
    ensure!(inside.nlink() == 1 && inside.blocks() == metadata.blocks());
    Ok(())
}

fn extended_attributes_go_both_ways() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let (inside, outside) = (guest.join("f"), host.join("f"));
    fs::write(&inside, "")?;
    let mut buffer = [0; 65536];
    for path in [&inside, &guest] {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(path, "user.key", b"value", flags)?;
        let length = rustix::fs::getxattr(path, "user.key", &mut buffer[..])?;
        ensure!(&buffer[..length] == b"value");
        ensure!(rustix::fs::listxattr(path, &mut buffer[..])? >= 9);
    }
    let length = rustix::fs::getxattr(&outside, "user.key", &mut buffer[..])?;
    ensure!(&buffer[..length] == b"value");
    let small = rustix::fs::getxattr(&inside, "user.key", &mut buffer[..2]);
    ensure!(small == Err(Errno::RANGE));
    rustix::fs::removexattr(&inside, "user.key")?;
    let gone = rustix::fs::getxattr(&outside, "user.key", &mut buffer[..]);
    ensure!(gone == Err(Errno::NODATA));
    let flags = rustix::fs::XattrFlags::empty();
    let trusted = rustix::fs::setxattr(&inside, "trusted.overlay.opaque", b"y", flags);
    ensure!(trusted == Err(Errno::PERM), "{trusted:?}");
    Ok(())
}

fn links_and_special_files_are_made_and_read() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::write(guest.join("f"), "x")?;
    symlink("../somewhere/else", guest.join("s"))?;
    ensure!(fs::read_link(guest.join("s"))?.to_str() == Some("../somewhere/else"));
    ensure!(fs::read_link(host.join("s"))?.to_str() == Some("../somewhere/else"));
    fs::hard_link(guest.join("f"), guest.join("g"))?;
    fs::hard_link(guest.join("s"), guest.join("t"))?;
    ensure!(fs::metadata(host.join("g"))?.nlink() == 2);
    ensure!(fs::symlink_metadata(host.join("t"))?.is_symlink());
    let inode = |name| fs::metadata(guest.join(name)).map(|m| m.ino());
    ensure!(inode("f")? == inode("g")?);
    let mode = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(CWD, guest.join("p"), rustix::fs::FileType::Fifo, mode, 0)?;
    ensure!(fs::symlink_metadata(host.join("p"))?.file_type().is_fifo());
    let socket = std::os::unix::net::UnixListener::bind(guest.join("sock"))?;
    std::os::unix::net::UnixStream::connect(guest.join("sock"))?;
    drop(socket);
    // A device node would be one of the host's.
    let device = rustix::fs::mknodat(
        CWD,
        guest.join("d"),
        rustix::fs::FileType::BlockDevice,
        mode,
        rustix::fs::makedev(8, 0),
    );
    ensure!(device == Err(Errno::PERM), "{device:?}");
    Ok(())
}

fn renames_can_refuse_and_exchange() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::write(guest.join("a"), "a")?;
    fs::write(guest.join("b"), "b")?;
    let rename =
        |flags| rustix::fs::renameat_with(CWD, guest.join("a"), CWD, guest.join("b"), flags);
    ensure!(rename(RenameFlags::NOREPLACE) == Err(Errno::EXIST));
    rename(RenameFlags::EXCHANGE)?;
    ensure!(fs::read(host.join("a"))? == b"b" && fs::read(guest.join("b"))? == b"a");
    rename(RenameFlags::empty())?;
    ensure!(fs::read(host.join("b"))? == b"b" && !host.join("a").exists());
    Ok(())
}

fn ten_thousand_entries_are_each_listed_once() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    for number in 0..10_000 {
        fs::write(host.join(format!("entry-{number}")), "")?;
    }
    for _ in 0..2 {
        let mut seen = HashSet::new();
        for entry in fs::read_dir(&guest)? {
            let entry = entry?;
            ensure!(entry.file_type()?.is_file());
            ensure!(seen.insert(entry.file_name()), "{entry:?} twice");
        }
        ensure!(seen.len() == 10_000, "{} entries", seen.len());
    }
    // And with attributes, and while they go.
    ensure!(shell(&guest, 0, 0, "", "ls -l | grep -c entry-")?.trim() == "10000");
    fs::remove_dir_all(&guest).err().context("it is a mount")?;
    ensure!(fs::read_dir(&host)?.next().is_none());
    Ok(())
}

fn a_sparse_gigabyte_keeps_its_holes() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let mut file = File::create_new(guest.join("sparse"))?;
    file.set_len(1 << 30)?;
    file.write_all_at(b"middle", 512 << 20)?;
    file.write_all_at(b"end", (1 << 30) - 3)?;
    let metadata = fs::metadata(host.join("sparse"))?;
    ensure!(metadata.len() == 1 << 30 && metadata.blocks() < 1000);
    let seek = |from| rustix::fs::seek(&file, from);
    ensure!(seek(rustix::fs::SeekFrom::Data(0))? == 512 << 20);
    ensure!(seek(rustix::fs::SeekFrom::Hole(512 << 20))? == (512 << 20) + 4096);
    file.seek(SeekFrom::End(-3))?;
    let mut end = Vec::new();
    File::open(guest.join("sparse"))?.take(0).read_to_end(&mut end)?;
    let reader = File::open(guest.join("sparse"))?;
    let mut bytes = [1; 6];
    reader.read_exact_at(&mut bytes, 512 << 20)?;
    ensure!(&bytes == b"middle");
    reader.read_exact_at(&mut bytes, 100 << 20)?;
    ensure!(bytes == [0; 6]);
    Ok(())
}

fn ranges_are_copied_and_space_is_reserved() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::write(guest.join("from"), "0123456789")?;
    let (from, to) = (File::open(guest.join("from"))?, File::create_new(guest.join("to"))?);
    let (mut at, mut target) = (2, 1);
    let copied = rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut target), 4)?;
    ensure!(copied == 4 && fs::read(host.join("to"))? == b"\x002345");
    rustix::fs::fallocate(&to, FallocateFlags::empty(), 0, 1 << 20)?;
    let metadata = fs::metadata(host.join("to"))?;
    ensure!(metadata.len() == 1 << 20 && metadata.blocks() >= 2048);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&to, punch, 0, 1 << 20)?;
    ensure!(fs::metadata(host.join("to"))?.blocks() < 2048);
    ensure!(fs::read(guest.join("to"))?.iter().all(|byte| *byte == 0));
    Ok(())
}

/// Bytes that differ at every place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32)
        .flat_map(|number| (number / 4).wrapping_mul(2_654_435_761).to_le_bytes())
        .step_by(4)
        .take(length)
        .collect()
}

fn large_files_come_back_as_written() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let data = pattern(20 << 20 | 4097);
    fs::write(guest.join("f"), &data)?;
    ensure!(fs::read(host.join("f"))? == data);
    ensure!(fs::read(guest.join("f"))? == data);
    fs::write(host.join("g"), &data)?;
    ensure!(fs::read(guest.join("g"))? == data);
    let file = File::open(guest.join("g"))?;
    let mut bytes = vec![0; 5000];
    for offset in (0..data.len() - 5000).step_by(1_000_003) {
        file.read_exact_at(&mut bytes, offset as u64)?;
        ensure!(bytes == data[offset..offset + 5000]);
    }
    Ok(())
}

fn direct_and_synchronous_writes_work() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let mode = Mode::from_raw_mode(0o600);
    for (name, flag) in
        [("direct", OFlags::DIRECT), ("sync", OFlags::SYNC), ("dsync", OFlags::DSYNC)]
    {
        let flags = flag | OFlags::CREATE | OFlags::RDWR;
        let file = File::from(rustix::fs::open(guest.join(name), flags, mode)?);
        let data = pattern(64 << 10);
        file.write_all_at(&data, 4096)?;
        file.sync_data()?;
        file.sync_all()?;
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, 4096)?;
        ensure!(back == data, "{name}");
        ensure!(fs::read(host.join(name))?[4096..] == data, "{name}");
    }
    File::open(&guest)?.sync_all()?;
    Ok(())
}

#[allow(unsafe_code)]
fn a_shared_mapping_reaches_the_host() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let length = 3 << 20;
    fs::write(guest.join("f"), pattern(length))?;
    let file = File::options().read(true).write(true).open(guest.join("f"))?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let address = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, &file, 0)?
    };
    // SAFETY: the mapping is `length` bytes long, nobody else has it, and it stays until munmap.
    let bytes = unsafe { std::slice::from_raw_parts_mut(address.cast::<u8>(), length) };
    ensure!(bytes == pattern(length));
    bytes[2 << 20..][..6].copy_from_slice(b"mapped");
    // SAFETY: the slice is not used after this.
    unsafe {
        rustix::mm::msync(address, length, MsyncFlags::SYNC)?;
        rustix::mm::munmap(address, length)?;
    }
    ensure!(&fs::read(host.join("f"))?[2 << 20..][..6] == b"mapped");
    Ok(())
}

fn programs_run_from_a_volume() -> Result<()> {
    let (_pod, _host, guest) = volume()?;
    fs::copy("/bin/true", guest.join("true"))?;
    ensure!(Command::new(guest.join("true")).status()?.success());
    let writer = OpenOptions::new().write(true).open(guest.join("true"))?;
    let busy = Command::new(guest.join("true")).status();
    ensure!(refusal(busy) == Some(Errno::TXTBSY));
    drop(writer);
    Ok(())
}

fn appends_from_both_sides_lose_nothing() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let open = |path| OpenOptions::new().append(true).create(true).open(path);
    let mut inside = open(guest.join("log"))?;
    let mut outside = open(host.join("log"))?;
    for number in 0..100 {
        writeln!(inside, "guest {number}")?;
        writeln!(outside, "host {number}")?;
    }
    let log = fs::read_to_string(host.join("log"))?;
    ensure!(log.lines().count() == 200, "{log}");
    ensure!(fs::read_to_string(guest.join("log"))? == log);
    Ok(())
}

fn locks_hold_between_processes_of_the_guest() -> Result<()> {
    let (_pod, _host, guest) = volume()?;
    let file = File::create(guest.join("f"))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
    let other = File::open(guest.join("f"))?;
    let taken = rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive);
    ensure!(taken == Err(Errno::AGAIN));
    drop(file);
    rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive)?;

    let file = File::create(guest.join("g"))?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // A POSIX lock is a process's: only another one can be refused.
    let other = Command::new(std::env::current_exe()?).arg("lock").arg(guest.join("g")).status()?;
    ensure!(other.code() == Some(7), "{other}");
    Ok(())
}

fn a_journal_written_as_databases_do_is_whole() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let database =
        File::options().read(true).write(true).create_new(true).open(guest.join("db"))?;
    let folder = File::open(&guest)?;
    for round in 0..50u64 {
        rustix::fs::fcntl_lock(&database, FlockOperation::LockExclusive)?;
        let journal = File::create_new(guest.join("db-journal"))?;
        let mut page = vec![0; 4096];
        if round > 0 {
            database.read_exact_at(&mut page, (round - 1) % 8 * 4096)?;
            ensure!(page == vec![round as u8 - 1; 4096], "round {round}");
        }
        journal.write_all_at(&page, 512)?;
        journal.write_all_at(&[7; 512], 0)?;
        journal.sync_all()?;
        folder.sync_all()?;
        database.write_all_at(&[round as u8; 4096], round % 8 * 4096)?;
        database.sync_data()?;
        fs::remove_file(guest.join("db-journal"))?;
        rustix::fs::fcntl_lock(&database, FlockOperation::Unlock)?;
    }
    ensure!(fs::read(host.join("db"))? == fs::read(guest.join("db"))?);
    ensure!(fs::metadata(host.join("db"))?.len() == 8 * 4096);
    ensure!(!host.join("db-journal").exists());
    Ok(())
}

fn an_unlinked_file_lives_while_it_is_open() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let file = File::options().read(true).write(true).create_new(true).open(guest.join("f"))?;
    fs::remove_file(guest.join("f"))?;
    file.write_all_at(b"still here", 0)?;
    ensure!(file.metadata()?.nlink() == 0 && file.metadata()?.len() == 10);
    let mut bytes = [0; 10];
    file.read_exact_at(&mut bytes, 0)?;
    ensure!(&bytes == b"still here");
    ensure!(fs::read_dir(&host)?.next().is_none());
    Ok(())
}

fn a_file_without_a_name_can_get_one() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let file = File::from(rustix::fs::open(&guest, flags, Mode::from_raw_mode(0o640))?);
    file.write_all_at(b"content", 0)?;
    ensure!(fs::read_dir(&host)?.next().is_none());
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::linkat(CWD, path, CWD, guest.join("f"), AtFlags::SYMLINK_FOLLOW)?;
    ensure!(fs::read(host.join("f"))? == b"content");
    ensure!(fs::metadata(host.join("f"))?.mode() & 0o7777 == 0o640);
    Ok(())
}

fn users_of_the_guest_own_what_they_make() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::set_permissions(&host, Permissions::from_mode(0o777))?;
    let script = "umask 027; touch f; mkdir d; ln -s f s; mkfifo p; echo x > d/g";
    shell(&guest, 1000, 1001, "", script)?;
    for name in ["f", "d", "s", "p", "d/g"] {
        let metadata = fs::symlink_metadata(host.join(name))?;
        ensure!((metadata.uid(), metadata.gid()) == (1000, 1001), "{name}: {metadata:?}");
    }
    ensure!(fs::metadata(host.join("f"))?.mode() & 0o777 == 0o640);
    // Another user is kept out by the guest's kernel, root is not.
    let denied = shell(&guest, 1002, 1002, "", "cat f 2>/dev/null || echo no")?;
    ensure!(denied.trim() == "no");
    shell(&guest, 0, 0, "", "cat f; echo more >> f")?;
    ensure!(fs::metadata(host.join("f"))?.uid() == 1000);
    fs::write(guest.join("root"), "")?;
    ensure!(fs::metadata(host.join("root"))?.uid() == 0, "and back again");
    Ok(())
}

fn a_group_the_server_does_not_know_may_write() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    // What kubelet makes of a volume with fsGroup.
    std::os::unix::fs::chown(&host, Some(0), Some(2000))?;
    fs::set_permissions(&host, Permissions::from_mode(0o2770))?;
    shell(&guest, 1000, 1000, "2000", "echo x > f; mkdir d; echo y > d/g; mv f h; rm d/g")?;
    let metadata = fs::metadata(host.join("h"))?;
    ensure!((metadata.uid(), metadata.gid()) == (1000, 2000));
    ensure!(fs::metadata(host.join("d"))?.mode() & 0o2000 != 0);
    Ok(())
}

fn a_write_by_another_user_ends_setuid() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    fs::set_permissions(&host, Permissions::from_mode(0o777))?;
    for (name, script) in
        [("write", "echo x >> write"), ("truncate", "truncate -s 1 truncate"), ("open", ": > open")]
    {
        let path = host.join(name);
        fs::write(&path, "program")?;
        fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
        shell(&guest, 1000, 1000, "", script)?;
        let mode = fs::metadata(&path)?.mode() & 0o7777;
        ensure!(mode == 0o777, "{name}: {mode:o}");
        ensure!(fs::metadata(guest.join(name))?.mode() & 0o7777 == 0o777);
        // Root may keep them.
        fs::set_permissions(&path, Permissions::from_mode(0o6777))?;
        shell(&guest, 0, 0, "", script)?;
        let mode = fs::metadata(&path)?.mode() & 0o7777;
        ensure!(mode == 0o6777, "{name} by root: {mode:o}");
    }
    Ok(())
}

fn files_of_different_devices_differ_in_number() -> Result<()> {
    let pod = Pod::start()?;
    let mut numbers = HashSet::new();
    for name in ["0", "1"] {
        let host = pod.host.join(name);
        fs::create_dir(&host)?;
        mount_tmpfs(&host)?;
        let (_, guest) = pod.volume(name, Access::ReadWrite)?;
        fs::write(guest.join("f"), "")?;
        ensure!(numbers.insert(fs::metadata(guest.join("f"))?.ino()));
        let listed = fs::read_dir(&guest)?.next().context("empty")??;
        ensure!(
            std::os::unix::fs::DirEntryExt::ino(&listed) == fs::metadata(guest.join("f"))?.ino()
        );
    }
    Ok(())
}

pub fn mount_tmpfs(target: &std::path::Path) -> Result<()> {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("test", target, "tmpfs", flags, c"size=8m")?;
    Ok(())
}

fn a_read_only_volume_refuses_every_change() -> Result<()> {
    let pod = Pod::start()?;
    let host = pod.host.join("0");
    fs::create_dir_all(host.join("d"))?;
    mount_tmpfs(&host.join("d"))?;
    fs::write(host.join("f"), "fixed")?;
    fs::write(host.join("d/f"), "fixed")?;
    pod.share.add("volumes/c/0", &host, Access::ReadOnlyRecursive, Propagation::Private)?;
    let guest = pod.guest.join("volumes/c/0");
    for guest in [guest.clone(), guest.join("d")] {
        ensure!(fs::read(guest.join("f"))? == b"fixed");
        let refused = [
            refusal(fs::write(guest.join("new"), "")),
            refusal(fs::write(guest.join("f"), "")),
            refusal(OpenOptions::new().append(true).open(guest.join("f"))),
            refusal(fs::create_dir(guest.join("new"))),
            refusal(symlink("x", guest.join("new"))),
            refusal(fs::hard_link(guest.join("f"), guest.join("new"))),
            refusal(fs::rename(guest.join("f"), guest.join("g"))),
            refusal(fs::remove_file(guest.join("f"))),
            refusal(fs::set_permissions(guest.join("f"), Permissions::from_mode(0o600))),
            refusal(std::os::unix::fs::chown(guest.join("f"), Some(1), None)),
            refusal(OpenOptions::new().write(true).truncate(true).open(guest.join("f"))),
            rustix::fs::setxattr(guest.join("f"), "user.x", b"", rustix::fs::XattrFlags::empty())
                .err(),
        ];
        ensure!(
            refused.iter().all(|errno| *errno == Some(Errno::ROFS)),
            "{}: {refused:?}",
            guest.display()
        );
    }
    // The mount points themselves, and what is not a volume.
    ensure!(refusal(fs::create_dir(pod.guest.join("volumes/x"))) == Some(Errno::ROFS));
    ensure!(refusal(fs::write(pod.guest.join("images/x"), "")) == Some(Errno::ROFS));
    ensure!(refusal(fs::write(pod.guest.join("x"), "")) == Some(Errno::ROFS));
    Ok(())
}

fn what_is_mounted_below_a_read_only_volume_is_read_only_when_asked() -> Result<()> {
    let pod = Pod::start()?;
    // The test's own namespace is the host here: what the share is a slave of.
    let host = pod.host.join("0");
    fs::create_dir(&host)?;
    mount_tmpfs(&host)?;
    rustix::mount::mount_change(&host, rustix::mount::MountPropagationFlags::SHARED)?;
    fs::create_dir(host.join("before"))?;
    fs::create_dir(host.join("later"))?;
    pod.share.add("volumes/c/alone", &host, Access::ReadOnly, Propagation::Private)?;
    ensure!(!pod.share.has_mounts_below("volumes/c/alone")?);
    mount_tmpfs(&host.join("before"))?;
    pod.share.add("volumes/c/plain", &host, Access::ReadOnly, Propagation::HostToContainer)?;
    pod.share.add("volumes/c/all", &host, Access::ReadOnlyRecursive, Propagation::Private)?;
    mount_tmpfs(&host.join("later"))?;
    ensure!(pod.share.has_mounts_below("volumes/c/plain")?);
    let refused = |path: &str| refusal(fs::write(pod.guest.join("volumes/c").join(path), ""));
    for path in ["alone/f", "alone/before/f", "plain/f", "all/f", "all/before/f", "all/later/f"] {
        ensure!(refused(path) == Some(Errno::ROFS), "{path}: {:?}", refused(path));
    }
    for path in ["plain/before/f", "plain/later/f"] {
        ensure!(refused(path).is_none(), "{path}: {:?}", refused(path));
    }
    ensure!(host.join("later/f").exists());
    Ok(())
}

fn an_image_is_mounted_from_the_share() -> Result<()> {
    let pod = Pod::start()?;
    let tree = pod.dir.path().join("tree");
    fs::create_dir_all(tree.join("usr/bin"))?;
    let data = pattern(5 << 20);
    fs::write(tree.join("usr/bin/program"), &data)?;
    let blob = pod.dir.path().join("layer.erofs");
    let made = Command::new("mkfs.erofs")
        .args(["--quiet", "-Enoinline_data"])
        .args([&blob, &tree])
        .status()?;
    ensure!(made.success());
    pod.share.add("images/layer", &blob, Access::ReadOnly, Propagation::HostToContainer)?;
    let image = pod.guest.join("images/layer");
    ensure!(fs::read(&image)? == fs::read(&blob)?);
    ensure!(refusal(OpenOptions::new().write(true).open(&image)) == Some(Errno::ROFS));
    let target = pod.dir.path().join("rootfs");
    fs::create_dir(&target)?;
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount(&image, &target, "erofs", flags, c"")?;
    let same = fs::read(target.join("usr/bin/program"))? == data;
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty())?;
    ensure!(same);
    Ok(())
}

fn free_space_is_that_of_the_volume() -> Result<()> {
    let pod = Pod::start()?;
    let host = pod.host.join("0");
    fs::create_dir(&host)?;
    mount_tmpfs(&host)?;
    let (_, guest) = pod.volume("0", Access::ReadWrite)?;
    let stat = rustix::fs::statvfs(&guest)?;
    ensure!(stat.f_blocks * stat.f_frsize == 8 << 20);
    let full = fs::write(guest.join("f"), vec![1; 9 << 20]);
    ensure!(refusal(full) == Some(Errno::NOSPC));
    Ok(())
}
