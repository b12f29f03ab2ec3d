//! Connections to an engine, one for each call, and how much of what comes over them is taken.
//!
//! The client library reads an answer, and a value of a stream, until it ends. An engine that never ends one is stopped here, at the bytes:
//! [`Allowance`] is what a call takes, and a stream begins it anew with each value that it was given.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bollard::BollardRequest;
use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderValue, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::{DockerEngineError, Endpoint};

/// How many bytes of an answer, or of one value of a stream, are taken.
#[derive(Debug)]
pub(super) struct Allowance {
    most: u64,
    taken: AtomicU64,
}

impl Allowance {
    pub(super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { most, taken: AtomicU64::new(0) })
    }

    /// A value of a stream is whole. What was too much once stays it.
    pub(super) fn restart(&self) {
        if self.taken.load(Ordering::Relaxed) <= self.most {
            self.taken.store(0, Ordering::Relaxed);
        }
    }

    /// Why nothing more was taken.
    pub(super) fn exceeded(&self) -> Option<String> {
        (self.taken.load(Ordering::Relaxed) > self.most).then(|| TooMuch { most: self.most }.to_string())
    }

    fn take(&self, bytes: usize) -> io::Result<()> {
        let taken = self.taken.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        if taken > self.most { Err(io::Error::other(TooMuch { most: self.most })) } else { Ok(()) }
    }
}

/// What came is longer than anything an engine has to say.
#[derive(Debug, thiserror::Error)]
#[error("it says more than {} MiB at once", .most >> 20)]
struct TooMuch {
    most: u64,
}

/// There is no connection.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct NotConnected(pub(super) io::Error);

/// Where to, with what is needed to get in.
#[derive(Clone)]
pub(super) enum Door {
    Unix(Arc<Path>),
    Tcp(Arc<str>),
    Tls { address: Arc<str>, config: Arc<ClientConfig> },
}

impl Door {
    /// Reads the certificates; connects nowhere.
    pub(super) fn of(endpoint: &Endpoint) -> Result<Self, DockerEngineError> {
        Ok(match endpoint {
            Endpoint::Unix(path) => Self::Unix(path.as_path().into()),
            Endpoint::Tcp(address) => Self::Tcp(address.as_str().into()),
            Endpoint::Tls { address, certificates } => Self::Tls { address: address.as_str().into(), config: Arc::new(tls(certificates)?) },
        })
    }

    fn host(&self) -> &str {
        match self {
            Self::Unix(_) => "localhost",
            Self::Tcp(address) | Self::Tls { address, .. } => address,
        }
    }

    /// The client library over connections to here.
    pub(super) fn client(&self, allowance: &Arc<Allowance>, seconds: u64) -> Result<bollard::Docker, bollard::errors::Error> {
        let (door, allowance) = (self.clone(), Arc::clone(allowance));
        let transport = move |request| exchange(door.clone(), Arc::clone(&allowance), request);
        let address = format!("http://{}", self.host());
        bollard::Docker::connect_with_custom_transport(transport, Some(address), seconds, bollard::API_DEFAULT_VERSION)
    }

    async fn connect(&self) -> io::Result<Box<dyn Duplex>> {
        Ok(match self {
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
            Self::Tcp(address) => Box::new(TcpStream::connect(&**address).await?),
            Self::Tls { address, config } => {
                let host = address.rsplit_once(':').map_or(&**address, |(host, _)| host).trim_matches(['[', ']']);
                let host = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
                let stream = TcpStream::connect(&**address).await?;
                Box::new(TlsConnector::from(Arc::clone(config)).connect(host, stream).await?)
            }
        })
    }
}

/// One request and the beginning of its answer.
async fn exchange(
    door: Door,
    allowance: Arc<Allowance>,
    mut request: BollardRequest,
) -> Result<Response<Incoming>, bollard::errors::Error> {
    let refused = |error: io::Error| bollard::errors::Error::from(io::Error::new(error.kind(), NotConnected(error)));
    let stream = door.connect().await.map_err(refused)?;
    let host = HeaderValue::from_str(door.host()).map_err(|error| bollard::errors::Error::from(io::Error::other(error)))?;
    request.headers_mut().insert(HOST, host);
    let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    let (mut sender, connection) = http1::handshake(TokioIo::new(Counted { stream: Box::into_pin(stream), allowance })).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender.send_request(request).await?)
}

/// With the certificates of this folder: who the engine is, and who we are.
fn tls(folder: &Path) -> Result<ClientConfig, DockerEngineError> {
    let told = |name: &str, reason: String| DockerEngineError::Configuration {
        what: format!("the certificate of the Docker Engine {}", folder.join(name).display()),
        reason,
    };
    let list = |name: &str| -> Result<Vec<CertificateDer<'static>>, DockerEngineError> {
        let bytes = std::fs::read(folder.join(name)).map_err(|error| told(name, error.to_string()))?;
        CertificateDer::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(|error| told(name, error.to_string()))
    };
    let key = std::fs::read(folder.join("key.pem")).map_err(|error| told("key.pem", error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| told("key.pem", error.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots.add_parsable_certificates(list("ca.pem")?);
    ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(list("cert.pem")?, key)
        .map_err(|error| told("cert.pem", error.to_string()))
}

/// Both directions.
trait Duplex: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

/// A connection of which only so much is read.
struct Counted {
    stream: Pin<Box<dyn Duplex>>,
    allowance: Arc<Allowance>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(self.stream.as_mut().poll_read(context, buffer))?;
        Poll::Ready(self.allowance.take(buffer.filled().len() - before))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream.as_mut().poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.as_mut().poll_shutdown(context)
    }
}
