//! How deep a template is nested, which minijinja bounds for brackets and not for chains: `a + a + a …` and `a.b.b.b …` are
//! trees as deep as they are long. Compiling one takes the square of its depth.

use minijinja::machinery::ast::{Call, CallArg, Expr, Macro, Stmt};
use minijinja::machinery::parse;
use minijinja::{Error, ErrorKind};

/// Levels of statements and expressions; the templates that models come with have some 30.
const MAX_DEPTH: usize = 500;

/// Reads a template, computes nothing of it, and looks how deep it is.
///
/// # Errors
/// What is wrong with its syntax, or that it is too deep.
pub(super) fn check(source: &str) -> Result<(), Error> {
    let template = parse(source, "template", super::syntax())?;
    let mut walk = Walk { nodes: vec![(Node::Stmt(&template), 0)], depth: 0 };
    while let Some((node, depth)) = walk.nodes.pop() {
        if depth > MAX_DEPTH {
            let message = format!("its statements or expressions are nested more than {MAX_DEPTH} deep");
            return Err(Error::new(ErrorKind::SyntaxError, message));
        }
        walk.depth = depth + 1;
        match node {
            Node::Stmt(stmt) => walk.inside_stmt(stmt),
            Node::Expr(expr) => walk.inside_expr(expr),
        }
    }
    Ok(())
}

enum Node<'t> {
    Stmt(&'t Stmt<'t>),
    Expr(&'t Expr<'t>),
}

/// What is yet to be looked at, each with its depth; and the depth of what is found now.
struct Walk<'t> {
    nodes: Vec<(Node<'t>, usize)>,
    depth: usize,
}

impl<'t> Walk<'t> {
    fn expr(&mut self, expr: &'t Expr<'t>) {
        self.nodes.push((Node::Expr(expr), self.depth));
    }

    fn exprs(&mut self, exprs: impl IntoIterator<Item = &'t Expr<'t>>) {
        exprs.into_iter().for_each(|expr| self.expr(expr));
    }

    fn body(&mut self, body: &'t [Stmt<'t>]) {
        let depth = self.depth;
        self.nodes.extend(body.iter().map(|stmt| (Node::Stmt(stmt), depth)));
    }

    fn arguments(&mut self, arguments: &'t [CallArg<'t>]) {
        for argument in arguments {
            let (CallArg::Pos(expr) | CallArg::Kwarg(_, expr) | CallArg::PosSplat(expr) | CallArg::KwargSplat(expr)) =
                argument;
            self.expr(expr);
        }
    }

    fn call(&mut self, call: &'t Call<'t>) {
        self.expr(&call.expr);
        self.arguments(&call.args);
    }

    fn function(&mut self, function: &'t Macro<'t>) {
        self.exprs(function.args.iter().chain(&function.defaults));
        self.body(&function.body);
    }

    fn inside_stmt(&mut self, stmt: &'t Stmt<'t>) {
        match stmt {
            Stmt::Template(template) => self.body(&template.children),
            Stmt::EmitExpr(emit) => self.expr(&emit.expr),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => {}
            Stmt::ForLoop(it) => {
                self.exprs([&it.target, &it.iter].into_iter().chain(&it.filter_expr));
                self.body(&it.body);
                self.body(&it.else_body);
            }
            Stmt::IfCond(it) => {
                self.expr(&it.expr);
                self.body(&it.true_body);
                self.body(&it.false_body);
            }
            Stmt::WithBlock(it) => {
                self.exprs(it.assignments.iter().flat_map(|(target, expr)| [target, expr]));
                self.body(&it.body);
            }
            Stmt::Set(it) => self.exprs([&it.target, &it.expr]),
            Stmt::SetBlock(it) => {
                self.exprs([&it.target].into_iter().chain(&it.filter));
                self.body(&it.body);
            }
            Stmt::AutoEscape(it) => {
                self.expr(&it.enabled);
                self.body(&it.body);
            }
            Stmt::FilterBlock(it) => {
                self.expr(&it.filter);
                self.body(&it.body);
            }
            Stmt::Block(it) => self.body(&it.body),
            Stmt::Import(it) => self.exprs([&it.expr, &it.name]),
            Stmt::FromImport(it) => {
                self.expr(&it.expr);
                self.exprs(it.names.iter().flat_map(|(name, alias)| [name].into_iter().chain(alias)));
            }
            Stmt::Extends(it) => self.expr(&it.name),
            Stmt::Include(it) => self.expr(&it.name),
            Stmt::Macro(it) => self.function(it),
            Stmt::CallBlock(it) => {
                self.call(&it.call);
                self.function(&it.macro_decl);
            }
            Stmt::Do(it) => self.call(&it.call),
        }
    }

    fn inside_expr(&mut self, expr: &'t Expr<'t>) {
        match expr {
            Expr::Var(_) | Expr::Const(_) => {}
            Expr::Slice(it) => {
                self.expr(&it.expr);
                self.exprs([&it.start, &it.stop, &it.step].into_iter().flatten());
            }
            Expr::UnaryOp(it) => self.expr(&it.expr),
            Expr::BinOp(it) => self.exprs([&it.left, &it.right]),
            Expr::Compare(it) => self.exprs([&it.expr].into_iter().chain(it.ops.iter().map(|operand| &operand.expr))),
            Expr::IfExpr(it) => self.exprs([&it.test_expr, &it.true_expr].into_iter().chain(&it.false_expr)),
            Expr::Filter(it) => {
                self.exprs(&it.expr);
                self.arguments(&it.args);
            }
            Expr::Test(it) => {
                self.expr(&it.expr);
                self.arguments(&it.args);
            }
            Expr::GetAttr(it) => self.expr(&it.expr),
            Expr::GetItem(it) => self.exprs([&it.expr, &it.subscript_expr]),
            Expr::Call(it) => self.call(it),
            Expr::List(it) => self.exprs(&it.items),
            Expr::Tuple(it) => self.exprs(&it.items),
            Expr::Map(it) => self.exprs(it.keys.iter().chain(&it.values)),
        }
    }
}
