//! A streaming server over a backend that gives back what it gets, for clients in other languages.
//!
//! Each line on stdin is a request, each line on stdout its URL:
//!
//! ```text
//! exec tcio WORD...      t: tty, c: stdin, i: stdout, o: stderr; `-` for none
//! attach tcio
//! forward PORT...
//! ```

#[path = "../tests/common/echo.rs"]
mod echo;

use a3s_box_streaming::{
    AttachRequest, Config, ExecRequest, PortForwardRequest, Server, Tls, Urls,
};
use anyhow::{Context, bail};
use std::{sync::Arc, time::Duration};
use tokio::io::{AsyncBufReadExt, BufReader};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config {
        address: ([127, 0, 0, 1], 0).into(),
        advertised: None,
        idle: Duration::from_secs(60),
        creation: Duration::from_secs(5),
    };
    let mut server = Server::bind(config).await?;
    let mut paths = std::env::args().skip(1);
    if let (Some(certificate), Some(key)) = (paths.next(), paths.next()) {
        let client_ca = paths.next().map(std::fs::read).transpose()?;
        let (certificate, key) = (std::fs::read(certificate)?, std::fs::read(key)?);
        server = server.with_tls(Tls::new(&certificate, &key, client_ca.as_deref())?)?;
    }
    let urls = server.urls();
    tokio::spawn(server.serve(Arc::new(echo::Echo::default())));
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        println!("{}", answer(&urls, &line)?);
    }
    Ok(())
}

fn answer(urls: &Urls, line: &str) -> anyhow::Result<String> {
    let mut words = line.split(' ');
    let kind = words.next().context("an empty line")?;
    if kind == "forward" {
        let ports = words.map(str::parse).collect::<Result<_, _>>()?;
        return Ok(urls.port_forward(PortForwardRequest { sandbox_id: "pod".to_owned(), ports })?);
    }
    let flags = words.next().context("no flags")?;
    let has = |flag| flags.contains(flag);
    let (tty, stdin, stdout, stderr) = (has('t'), has('c'), has('i'), has('o'));
    let container_id = "container".to_owned();
    Ok(match kind {
        "exec" => {
            let command = words.map(str::to_owned).collect();
            urls.exec(ExecRequest { container_id, command, tty, stdin, stdout, stderr })?
        }
        "attach" => urls.attach(AttachRequest { container_id, tty, stdin, stdout, stderr })?,
        _ => bail!("{kind:?} is no request"),
    })
}
