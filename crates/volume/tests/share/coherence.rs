//! What the host does is what the guest sees, and when.

use crate::files::mount_tmpfs;
use crate::fixture::{Pod, process, refusal, volume};
use crate::tests;
use a3s_box_volume::{Access, Propagation};
use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

tests![
    a_file_the_host_rewrites_is_read_as_it_is,
    an_atomic_swap_of_a_config_map_is_seen_at_once,
    volumes_come_and_go_while_the_guest_runs,
    a_file_can_be_a_volume,
    mounts_of_the_host_appear_below_a_volume,
    nothing_the_guest_sees_reaches_back_to_the_host,
    a_clone_goes_on_where_its_template_was_answered,
    a_request_under_way_fails_when_the_host_hangs_up,
    names_outside_the_share_are_refused,
];

fn a_file_the_host_rewrites_is_read_as_it_is() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    let (outside, inside) = (host.join("f"), guest.join("f"));
    let mut open = None;
    for length in [10, 100_000, 3, 0, 5000, 4096, 4097] {
        let data = vec![length as u8 + 1; length];
        fs::write(&outside, &data)?;
        ensure!(fs::metadata(&inside)?.len() == length as u64);
        ensure!(fs::read(&inside)? == data, "{length} bytes");
        let file = match &open {
            Some(file) => file,
            None => open.insert(fs::File::open(&inside)?),
        };
        let mut held = vec![0; length + 1];
        let count = std::os::unix::fs::FileExt::read_at(file, &mut held, 0)?;
        ensure!(held[..count] == data, "{length} bytes through an old descriptor");
    }
    fs::remove_file(&outside)?;
    ensure!(refusal(fs::metadata(&inside)) == Some(Errno::NOENT));
    fs::create_dir(&outside)?;
    ensure!(fs::metadata(&inside)?.is_dir());
    Ok(())
}

fn an_atomic_swap_of_a_config_map_is_seen_at_once() -> Result<()> {
    let (_pod, host, guest) = volume()?;
    symlink("..data/key", host.join("key"))?;
    for version in 0..20 {
        let folder = format!("..version_{version}");
        fs::create_dir(host.join(&folder))?;
        fs::write(host.join(&folder).join("key"), format!("value {version}"))?;
        symlink(&folder, host.join("..data_tmp"))?;
        fs::rename(host.join("..data_tmp"), host.join("..data"))?;
        ensure!(fs::read_to_string(guest.join("key"))? == format!("value {version}"));
    }
    Ok(())
}

fn volumes_come_and_go_while_the_guest_runs() -> Result<()> {
    let pod = Pod::start()?;
    let absent = pod.guest.join("volumes/c/0/f");
    ensure!(refusal(fs::metadata(&absent)) == Some(Errno::NOENT));
    for round in 0..3 {
        let (host, guest) = pod.volume("0", Access::ReadWrite)?;
        fs::write(guest.join("f"), format!("{round}"))?;
        ensure!(fs::read_to_string(host.join("f"))? == format!("{round}"));
        ensure!(
            pod.share
                .add("volumes/c/0", &host, Access::ReadWrite, Propagation::HostToContainer)
                .is_err(),
            "one name, one volume"
        );
        pod.share.remove("volumes/c")?;
        ensure!(refusal(fs::metadata(&absent)) == Some(Errno::NOENT));
        ensure!(fs::read_dir(pod.guest.join("volumes"))?.next().is_none());
        ensure!(host.join("f").exists(), "the host keeps its files");
        pod.share.remove("volumes/c")?;
    }
    Ok(())
}

fn a_file_can_be_a_volume() -> Result<()> {
    let pod = Pod::start()?;
    let file = pod.host.join("resolv.conf");
    fs::write(&file, "one")?;
    pod.share.add("volumes/c/0", &file, Access::ReadWrite, Propagation::HostToContainer)?;
    let inside = pod.guest.join("volumes/c/0");
    ensure!(fs::read(&inside)? == b"one");
    fs::write(&inside, "from the guest")?;
    ensure!(fs::read(&file)? == b"from the guest");
    ensure!(refusal(fs::remove_file(&inside)).is_some());
    Ok(())
}

fn mounts_of_the_host_appear_below_a_volume() -> Result<()> {
    let pod = Pod::start()?;
    // The test's own namespace is the host here: what the share is a slave of.
    let outer = pod.host.join("outer");
    fs::create_dir(&outer)?;
    mount_tmpfs(&outer)?;
    rustix::mount::mount_change(&outer, rustix::mount::MountPropagationFlags::SHARED)?;
    fs::create_dir(outer.join("d"))?;
    pod.share.add("volumes/c/0", &outer, Access::ReadWrite, Propagation::HostToContainer)?;
    let inside = pod.guest.join("volumes/c/0/d");
    ensure!(fs::read_dir(&inside)?.next().is_none());
    mount_tmpfs(&outer.join("d"))?;
    fs::write(outer.join("d/later"), "mounted later")?;
    ensure!(fs::read(inside.join("later"))? == b"mounted later");
    fs::write(inside.join("back"), "x")?;
    ensure!(outer.join("d/back").exists());
    rustix::mount::unmount(outer.join("d"), UnmountFlags::DETACH)?;
    ensure!(fs::read_dir(&inside)?.next().is_none());
    Ok(())
}

fn nothing_the_guest_sees_reaches_back_to_the_host() -> Result<()> {
    let pod = Pod::start()?;
    let outer = pod.host.join("outer");
    fs::create_dir(&outer)?;
    mount_tmpfs(&outer)?;
    rustix::mount::mount_change(&outer, rustix::mount::MountPropagationFlags::SHARED)?;
    fs::create_dir(outer.join("d"))?;
    mount_tmpfs(&outer.join("d"))?;
    fs::write(outer.join("d/f"), "")?;
    pod.share.add("volumes/c/0", &outer, Access::ReadOnly, Propagation::HostToContainer)?;
    pod.share.remove("volumes/c")?;
    ensure!(outer.join("d/f").exists(), "still mounted on the host");
    fs::write(outer.join("d/f"), "and writable")?;
    Ok(())
}

fn a_clone_goes_on_where_its_template_was_answered() -> Result<()> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let [root, guest] = ["share", "guest"].map(|name| dir.path().join(name));
    fs::create_dir(&guest)?;
    let share = a3s_box_volume::Share::create(&root)?;
    fs::create_dir(dir.path().join("v"))?;
    share.add(
        "volumes/c/0",
        &dir.path().join("v"),
        Access::ReadWrite,
        Propagation::HostToContainer,
    )?;
    let (ours, theirs) = UnixStream::pair()?;
    let target = guest.to_str().context("path")?;
    let mut pump = process(&["pump", target], theirs.into(), Stdio::piped())?;
    let mut line = String::new();
    BufReader::new(pump.0.stdout.take().context("stdout")?).read_line(&mut line)?;

    ours.set_nonblocking(true)?;
    let init = a3s_box_volume::handshake(&ours)?;
    fs::write(root.with_extension("init"), init)?;
    let root_name = root.to_str().context("path")?;
    let server = process(&["server-after-init", root_name], ours.into(), Stdio::inherit())?;

    let data = vec![5; 3 << 20];
    fs::write(guest.join("volumes/c/0/f"), &data)?;
    let same = fs::read(dir.path().join("v/f"))? == data;
    drop(server);
    for path in [&guest, &root] {
        rustix::mount::unmount(path, UnmountFlags::DETACH)?;
    }
    ensure!(same);
    Ok(())
}

fn a_request_under_way_fails_when_the_host_hangs_up() -> Result<()> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let guest = dir.path().join("guest");
    fs::create_dir(&guest)?;
    let (ours, theirs) = UnixStream::pair()?;
    let target = guest.to_str().context("path")?;
    let mut pump = process(&["pump", target], theirs.into(), Stdio::piped())?;
    let mut line = String::new();
    BufReader::new(pump.0.stdout.take().context("stdout")?).read_line(&mut line)?;
    a3s_box_volume::handshake(&ours)?;
    let asking = {
        let path = guest.join("f");
        std::thread::spawn(move || refusal(fs::metadata(path)))
    };
    // The request is on its way once its first byte can be read.
    let mut byte = [0];
    std::io::Read::read_exact(&mut &ours, &mut byte)?;
    drop(ours);
    let answer = asking.join().ok().flatten();
    drop(pump);
    rustix::mount::unmount(&guest, UnmountFlags::DETACH)?;
    ensure!(answer == Some(Errno::IO), "{answer:?}");
    Ok(())
}

fn names_outside_the_share_are_refused() -> Result<()> {
    let pod = Pod::start()?;
    for bad in ["", "/", "/etc", "..", "images/../x", "./x", "a//b", "a/", "volumes/."] {
        let added = pod.share.add(bad, &pod.host, Access::ReadOnly, Propagation::HostToContainer);
        ensure!(matches!(added, Err(a3s_box_volume::Error::Name(_))), "{bad:?}: {added:?}");
        ensure!(pod.share.remove(bad).is_err(), "{bad:?}");
    }
    let absent = pod.share.add(
        "images/x",
        &pod.host.join("absent"),
        Access::ReadOnly,
        Propagation::HostToContainer,
    );
    ensure!(absent.is_err());
    ensure!(!pod.guest.join("images/x").exists());
    Ok(())
}
