//! A guest that means harm gets an error or loses the connection; never a file outside.

use crate::fixture::{Pod, refusal};
use crate::raw::{ROOT, Raw, first, init, longs, numbers, op, string};
use crate::tests;
use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;

tests![
    the_server_can_do_little,
    dots_and_slashes_are_no_names,
    a_link_leads_nowhere_on_the_host,
    special_files_are_never_opened,
    devices_are_never_made,
    numbers_never_given_out_are_refused,
    forgetting_too_much_is_harmless,
    short_bodies_are_refused,
    sizes_beyond_the_agreed_are_refused,
    a_length_that_cannot_be_ends_the_connection,
    a_first_message_other_than_init_ends_the_connection,
    random_bytes_never_kill_the_server,
    a_guest_cannot_fill_the_servers_table,
];

fn errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

fn the_server_can_do_little() -> Result<()> {
    let pod = Pod::start()?;
    // One answer proves that it is past its preparations.
    ensure!(fs::read_dir(&pod.guest)?.count() == 2);
    let process = format!("/proc/{}", pod.server.0.id());
    let mut root: Vec<_> = fs::read_dir(format!("{process}/root"))?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<std::io::Result<_>>()?;
    root.sort();
    ensure!(root == ["images", "volumes"], "{root:?}");
    ensure!(refusal(fs::write(format!("{process}/root/x"), "")) == Some(Errno::ROFS));
    let mounts = fs::read_to_string(format!("{process}/mountinfo"))?;
    ensure!(mounts.lines().count() == 1, "{mounts}");
    for task in fs::read_dir(format!("{process}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let value = |name: &str| -> Result<String> {
            let line = status.lines().find(|line| line.starts_with(name));
            Ok(line.context("status")?[name.len() + 1..].trim().to_owned())
        };
        ensure!(value("NoNewPrivs")? == "1" && value("Seccomp")? == "2");
        ensure!(value("CapBnd")? == "0000000000000000", "{status}");
        // chown, dac_override, fowner, fsetid, setgid, setuid, setfcap
        ensure!(value("CapPrm")? == "00000000800000db", "{status}");
        ensure!(value("Groups")?.is_empty());
    }
    Ok(())
}

fn dots_and_slashes_are_no_names() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    fs::write(raw.host.join("f"), "")?;
    for bad in ["..", ".", "", "a/b", "/etc", "../../etc", "f/"] {
        for node in [ROOT, volume] {
            let (error, _) = raw.ask(op::LOOKUP, node, &string(bad))?;
            ensure!(error == errno(Errno::INVAL), "{bad:?}: {error}");
        }
        let body = [numbers(&[0o102, 0o600, 0, 0]), string(bad)].concat();
        let (error, _) = raw.ask(op::CREATE, volume, &body)?;
        ensure!(error == errno(Errno::INVAL), "{bad:?}: {error}");
    }
    ensure!(raw.is_alive()?);
    Ok(())
}

fn a_link_leads_nowhere_on_the_host() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    fs::write(raw.host.with_file_name("secret"), "secret")?;
    symlink("../secret", raw.host.join("up"))?;
    symlink("/etc/passwd", raw.host.join("absolute"))?;
    symlink("/", raw.host.join("root"))?;
    symlink("/proc/self/fd/0", raw.host.join("magic"))?;
    for name in ["up", "absolute", "root", "magic"] {
        let link = raw.lookup(volume, name)?;
        let (error, _) = raw.ask(op::OPEN, link, &numbers(&[0, 0]))?;
        ensure!(error == errno(Errno::LOOP), "open {name}: {error}");
        let (error, _) = raw.ask(op::OPENDIR, link, &numbers(&[0, 0]))?;
        ensure!(error != 0, "open {name} as a folder");
        let (error, _) = raw.ask(op::LOOKUP, link, &string("etc"))?;
        ensure!(error == errno(Errno::NOTDIR), "through {name}: {error}");
        // Creating over it opens what is there, which is a link.
        let body = [numbers(&[0o1002, 0o600, 0, 0]), string(name)].concat();
        let (error, _) = raw.ask(op::CREATE, volume, &body)?;
        ensure!(error == errno(Errno::LOOP), "create {name}: {error}");
        let (error, target) = raw.ask(op::READLINK, link, &[])?;
        ensure!(error == 0 && !target.is_empty());
    }
    // A file replaced by a link keeps being the file.
    fs::write(raw.host.join("f"), "file")?;
    let file = raw.lookup(volume, "f")?;
    fs::remove_file(raw.host.join("f"))?;
    symlink("../secret", raw.host.join("f"))?;
    let (error, body) = raw.ask(op::OPEN, file, &numbers(&[0, 0]))?;
    ensure!(error == 0);
    let read = [longs(&[first(&body)?, 0]), numbers(&[100, 0, 0, 0, 0, 0])].concat();
    ensure!(raw.ask(op::READ, file, &read)? == (0, b"file".to_vec()));
    Ok(())
}

fn special_files_are_never_opened() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    for (name, kind, device) in [
        ("fifo", rustix::fs::FileType::Fifo, 0),
        ("null", rustix::fs::FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("disk", rustix::fs::FileType::BlockDevice, rustix::fs::makedev(7, 0)),
    ] {
        rustix::fs::mknodat(rustix::fs::CWD, raw.host.join(name), kind, mode, device)?;
        let node = raw.lookup(volume, name)?;
        for flags in [0, 1, 2, 0o1000] {
            let (error, _) = raw.ask(op::OPEN, node, &numbers(&[flags, 0]))?;
            ensure!(error == errno(Errno::NXIO), "{name}: {error}");
        }
        let body = [numbers(&[0o1102, 0o600, 0, 0]), string(name)].concat();
        let (error, _) = raw.ask(op::CREATE, volume, &body)?;
        ensure!(error == errno(Errno::NXIO), "create {name}: {error}");
    }
    Ok(())
}

fn devices_are_never_made() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    for (mode, device) in
        [(0o020666, 0x103), (0o060666, 0x800), (0o060666, 0), (0o040755, 0), (0, 0)]
    {
        let body = [numbers(&[mode, device, 0, 0]), string("d")].concat();
        let (error, _) = raw.ask(op::MKNOD, volume, &body)?;
        ensure!(error == errno(Errno::PERM), "{mode:o} {device:x}: {error}");
    }
    let whiteout = [numbers(&[0o020000, 0, 0, 0]), string("w")].concat();
    ensure!(raw.ask(op::MKNOD, volume, &whiteout)?.0 == 0);
    Ok(())
}

fn numbers_never_given_out_are_refused() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    for node in [0, volume + 1, 1 << 40, u64::MAX] {
        let (error, _) = raw.ask(op::GETATTR, node, &[0; 16])?;
        ensure!(error == errno(Errno::NOENT), "{node}: {error}");
        let (error, _) = raw.ask(op::LOOKUP, node, &string("f"))?;
        ensure!(error == errno(Errno::NOENT));
        let link = [longs(&[node]), string("f")].concat();
        ensure!(raw.ask(op::LINK, volume, &link)?.0 == errno(Errno::NOENT));
    }
    for handle in [0, 1, u64::MAX] {
        let read = [longs(&[handle, 0]), numbers(&[10, 0, 0, 0, 0, 0])].concat();
        ensure!(raw.ask(op::READ, volume, &read)?.0 == errno(Errno::BADF));
        ensure!(raw.ask(op::READDIR, volume, &read)?.0 == errno(Errno::BADF));
    }
    // A folder's handle is not a file's.
    let (_, body) = raw.ask(op::OPENDIR, volume, &numbers(&[0, 0]))?;
    let read = [longs(&[first(&body)?, 0]), numbers(&[10, 0, 0, 0, 0, 0])].concat();
    ensure!(raw.ask(op::READ, volume, &read)?.0 == errno(Errno::ISDIR));
    ensure!(raw.ask(4095, volume, &[])?.0 == errno(Errno::NOSYS));
    ensure!(raw.ask(op::INIT, 0, &init())?.0 == errno(Errno::INVAL));
    Ok(())
}

fn forgetting_too_much_is_harmless() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    for node in [ROOT, 0, 77, u64::MAX] {
        raw.send(op::FORGET, node, &longs(&[u64::MAX]))?;
    }
    raw.send(op::FORGET, volume, &longs(&[u64::MAX]))?;
    raw.send(op::FORGET, volume, &longs(&[1]))?;
    raw.send(op::FORGET, volume, &[])?;
    // Says that four thousand million follow.
    let batch = [numbers(&[u32::MAX, 0]), longs(&[volume, 1])].concat();
    raw.send(op::BATCH_FORGET, 0, &batch)?;
    ensure!(raw.is_alive()?);
    ensure!(raw.ask(op::GETATTR, volume, &[0; 16])?.0 == errno(Errno::NOENT));
    ensure!(raw.volume()? != volume, "a number is used once");
    Ok(())
}

fn short_bodies_are_refused() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    fs::write(raw.host.join("f"), "")?;
    let node = raw.lookup(volume, "f")?;
    for opcode in 1..60 {
        // Forgetting, interrupting and notifying have no answer; some need no body.
        if matches!(opcode, 2 | 3 | 5 | 17 | 36 | 38 | 41 | 42) || opcode == op::OPENDIR {
            continue;
        }
        for body in [&[][..], &[1], &[0xff; 7]] {
            let (error, body) = raw.ask(opcode, node, body)?;
            ensure!(error != 0 && body.is_empty(), "operation {opcode}");
        }
    }
    // A name whose end is missing.
    let (error, _) = raw.ask(op::LOOKUP, volume, b"f")?;
    ensure!(error == errno(Errno::INVAL));
    // A write that promises more than it brings.
    let (_, body) = raw.ask(op::OPEN, node, &numbers(&[2, 0]))?;
    let write = [longs(&[first(&body)?, 0]), numbers(&[1000, 0, 0, 0, 0, 0]), vec![1; 10]].concat();
    ensure!(raw.ask(op::WRITE, node, &write)?.0 == errno(Errno::INVAL));
    ensure!(fs::metadata(raw.host.join("f"))?.len() == 0);
    Ok(())
}

fn sizes_beyond_the_agreed_are_refused() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    fs::write(raw.host.join("f"), vec![1; 3 << 20])?;
    let node = raw.lookup(volume, "f")?;
    let (_, body) = raw.ask(op::OPEN, node, &numbers(&[0, 0]))?;
    let file = first(&body)?;
    let (_, body) = raw.ask(op::OPENDIR, volume, &numbers(&[0, 0]))?;
    let folder = first(&body)?;
    for size in [(1 << 20) + 1, 2 << 20, u32::MAX] {
        let read = |handle| [longs(&[handle, 0]), numbers(&[size, 0, 0, 0, 0, 0])].concat();
        ensure!(raw.ask(op::READ, node, &read(file))?.0 == errno(Errno::INVAL));
        if size > 2 << 20 {
            ensure!(raw.ask(op::READDIR, volume, &read(folder))?.0 == errno(Errno::INVAL));
        }
    }
    for offset in [i64::MAX as u64, u64::MAX] {
        let read = [longs(&[file, offset]), numbers(&[4096, 0, 0, 0, 0, 0])].concat();
        let (error, body) = raw.ask(op::READ, node, &read)?;
        ensure!(error == errno(Errno::INVAL) || body.is_empty());
        let read = [longs(&[folder, offset]), numbers(&[4096, 0, 0, 0, 0, 0])].concat();
        raw.ask(op::READDIR, volume, &read)?;
    }
    let whole = [longs(&[file, 0]), numbers(&[1 << 20, 0, 0, 0, 0, 0])].concat();
    ensure!(raw.ask(op::READ, node, &whole)?.1.len() == 1 << 20);
    Ok(())
}

/// Waits for the server's end and says whether it ended by itself, with an error.
fn ended_with_error(raw: &mut Raw) -> Result<bool> {
    let mut rest = Vec::new();
    raw.stream.read_to_end(&mut rest)?;
    Ok(rest.is_empty() && raw.server.0.wait()?.code() == Some(1))
}

fn a_length_that_cannot_be_ends_the_connection() -> Result<()> {
    for length in [0u32, 1, 39, (1 << 20) + 4097, u32::MAX] {
        let mut raw = Raw::connected()?;
        raw.stream.write_all(&length.to_ne_bytes())?;
        raw.stream.write_all(&[0; 36])?;
        ensure!(ended_with_error(&mut raw)?, "{length}");
    }
    // Half a message, and then nothing: the guest is gone, which is no error.
    let mut raw = Raw::connected()?;
    raw.stream.write_all(&100u32.to_ne_bytes())?;
    raw.stream.shutdown(std::net::Shutdown::Write)?;
    ensure!(raw.server.0.wait()?.success());
    Ok(())
}

fn a_first_message_other_than_init_ends_the_connection() -> Result<()> {
    let mut raw = Raw::start()?;
    raw.send(op::GETATTR, ROOT, &[0; 16])?;
    ensure!(ended_with_error(&mut raw)?);
    for body in [numbers(&[7, 20, 0, u32::MAX]), numbers(&[6, 41, 0, u32::MAX]), vec![7]] {
        let mut raw = Raw::start()?;
        raw.send(op::INIT, 0, &body)?;
        ensure!(ended_with_error(&mut raw)?);
    }
    Ok(())
}

fn random_bytes_never_kill_the_server() -> Result<()> {
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    fs::write(raw.host.join("f"), vec![1; 10_000])?;
    raw.lookup(volume, "f")?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let length = (random() % 120) as usize;
        // Small numbers, so that nodes, handles and names are met.
        let body: Vec<u8> = (0..length)
            .map(|at| match random() % 8 {
                0 => random() as u8,
                1 => b'f',
                2 => (random() % 8) as u8,
                _ if at % 8 == 0 => (random() % 8) as u8,
                _ => 0,
            })
            .collect();
        let opcode = (random() % 56) as u32;
        let node = random() % 9;
        if matches!(opcode, 2 | 36 | 41 | 42) {
            raw.send(opcode, node, &body)?;
        } else {
            raw.ask(opcode, node, &body)?;
        }
    }
    ensure!(raw.is_alive()?);
    Ok(())
}

fn a_guest_cannot_fill_the_servers_table() -> Result<()> {
    // The server's limit is what the test's process leaves it.
    let limit = rustix::process::Rlimit { current: Some(200), maximum: Some(200) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?;
    let mut raw = Raw::connected()?;
    let volume = raw.volume()?;
    for number in 0..300 {
        fs::write(raw.host.join(number.to_string()), "")?;
    }
    let mut known = Vec::new();
    for number in 0..300 {
        let (error, body) = raw.ask(op::LOOKUP, volume, &string(&number.to_string()))?;
        match error {
            0 => known.push(first(&body)?),
            error => ensure!(error == errno(Errno::NFILE), "{error}"),
        }
    }
    ensure!((50..150).contains(&known.len()), "{}", known.len());
    // Open files have a share of their own.
    let opened = raw.ask(op::OPEN, known[0], &numbers(&[0, 0]))?;
    ensure!(opened.0 == 0);
    let mut refused = 0;
    for _ in 0..200 {
        refused +=
            i32::from(raw.ask(op::OPEN, known[0], &numbers(&[0, 0]))?.0 == errno(Errno::NFILE));
    }
    ensure!(refused > 100, "{refused}");
    for node in known {
        raw.send(op::FORGET, node, &longs(&[1]))?;
    }
    ensure!(raw.lookup(volume, "299").is_ok(), "room again");
    Ok(())
}
