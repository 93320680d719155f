//! A network that fails when it is told to: a TCP forwarder between the server under test and its storage.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What becomes of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They pass.
    Pass,
    /// They wait until the mode is another.
    Stall,
    /// A request is answered with this status and goes no further; of an answer that is under way nothing more passes.
    Answer(u16),
    /// A connection is closed once it has given that many bytes.
    CutAfter(usize),
    /// A connection gives that many bytes and then none.
    StallAfter(usize),
}

/// A forwarder; it ends with this.
pub(crate) struct Proxy {
    /// Where it listens, `http://127.0.0.1:PORT`.
    pub(crate) url: String,
    mode: watch::Sender<Mode>,
    _connections: JoinSet<()>,
}

impl Proxy {
    /// A forwarder to `http://HOST:PORT`.
    pub(crate) async fn start(target: &str) -> Self {
        let target: SocketAddr = target.trim_start_matches("http://").parse().expect("an address");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (mode, modes) = watch::channel(Mode::Pass);
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                open.spawn(forward(client, target, modes.clone()));
            }
        });
        Self { url, mode, _connections: connections }
    }

    /// From now on.
    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn forward(client: TcpStream, target: SocketAddr, modes: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (client_read, mut client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let answer = tokio::select! {
        answer = requests(client_read, server_write, modes.clone()) => answer,
        () = answers(server_read, &mut client_write, modes) => None,
    };
    if let Some(status) = answer {
        let text = format!("HTTP/1.1 {status} No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        // A client that has gone needs no answer.
        let _ = client_write.write_all(text.as_bytes()).await;
        let _ = client_write.shutdown().await;
    }
}

/// Passes requests on until one is to be answered here.
async fn requests(
    mut client: tokio::net::tcp::OwnedReadHalf,
    mut server: tokio::net::tcp::OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
) -> Option<u16> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = client.read(&mut buffer).await.ok().filter(|length| *length > 0)?;
        modes.wait_for(|mode| *mode != Mode::Stall).await.ok()?;
        let mode = *modes.borrow();
        if let Mode::Answer(status) = mode {
            // The rest of the request: one that is cut off in the middle would see no answer.
            let rest = Duration::from_millis(50);
            while let Ok(Ok(1..)) = tokio::time::timeout(rest, client.read(&mut buffer)).await {}
            return Some(status);
        }
        server.write_all(&buffer[..length]).await.ok()?;
    }
}

/// Passes answers on until the connection is to end.
async fn answers(
    mut server: tokio::net::tcp::OwnedReadHalf,
    client: &mut tokio::net::tcp::OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
) {
    let mut buffer = vec![0; 16 << 10];
    let mut given = 0;
    while let Ok(length @ 1..) = server.read(&mut buffer).await {
        if modes.wait_for(|mode| !matches!(mode, Mode::Stall | Mode::Answer(_))).await.is_err() {
            return;
        }
        let mode = *modes.borrow();
        let most = match mode {
            Mode::CutAfter(most) | Mode::StallAfter(most) => most,
            _ => usize::MAX,
        };
        let passes = length.min(most.saturating_sub(given));
        if client.write_all(&buffer[..passes]).await.is_err() {
            return;
        }
        given += passes;
        if passes < length {
            if let Mode::StallAfter(_) = mode {
                std::future::pending::<()>().await;
            }
            return;
        }
    }
}
